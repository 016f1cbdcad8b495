"""The flatbuffer of a `.tflite` file, read, written and quantized by TensorFlow.

The modules of TensorFlow behind it are not part of its documented API. They were seen in
TensorFlow 2.21. `tests/tflite/test_flatbuffer.py` tells which of them an update has taken away.
"""

from __future__ import annotations

from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

__all__ = ["quantize_model", "read_model", "schema", "write_model"]


def read_model(content: bytes) -> schema.ModelT:
    """Returns the parsed bytes of a file."""
    return flatbuffer_utils.convert_bytearray_to_object(content)


def write_model(model: schema.ModelT) -> bytes:
    """Returns the bytes of a file."""
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def quantize_model(model: schema.ModelT) -> bytes:
    """Returns a file that computes in 8 bits, from a model with the ranges of its activations.

    The TFLite converter ends with this call. Calling it here allows other ranges.
    """
    from tensorflow.lite.python.convert import mlir_quantize

    return mlir_quantize(write_model(model))
