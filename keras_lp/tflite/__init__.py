"""Exports models to LiteRT (TensorFlow Lite) files that run and train on a phone."""

from keras_lp.tflite.device.aggregation import DeviceRound, aggregate_device_updates
from keras_lp.tflite.device.client import PhoneClient
from keras_lp.tflite.device.device import DeviceTrainer
from keras_lp.tflite.export.export import export_tflite
from keras_lp.tflite.export.report import ExportReport
from keras_lp.tflite.metadata.annotate import TFLiteMetadata
from keras_lp.tflite.training.training import TrainableReport, export_trainable_tflite

__all__ = [
    "DeviceRound",
    "DeviceTrainer",
    "ExportReport",
    "PhoneClient",
    "TFLiteMetadata",
    "TrainableReport",
    "aggregate_device_updates",
    "export_tflite",
    "export_trainable_tflite",
]
