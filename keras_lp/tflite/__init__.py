"""Models on a phone: LiteRT (TensorFlow Lite) files."""

from keras_lp.tflite.export import ExportReport, export_tflite

__all__ = ["ExportReport", "export_tflite"]
