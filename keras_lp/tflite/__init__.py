"""Models on a phone: LiteRT (TensorFlow Lite) files."""

from keras_lp.tflite.annotate import TFLiteMetadata
from keras_lp.tflite.export import export_tflite
from keras_lp.tflite.report import ExportReport

__all__ = ["ExportReport", "TFLiteMetadata", "export_tflite"]
