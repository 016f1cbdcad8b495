"""The undocumented modules of TensorFlow that read, write and quantize files still do."""

import numpy as np
import pytest
import tensorflow as tf

GONE = (
    f"TensorFlow {tf.__version__} has changed what keras_lp.tflite.flatbuffer uses. Find what "
    "replaces it, and change it there. "
)


@pytest.fixture(scope="module")
def flatbuffer():
    try:
        from keras_lp.tflite import flatbuffer
    except ImportError as error:
        pytest.fail(f"{GONE}{error}")
    return flatbuffer


@pytest.fixture(scope="module")
def content():
    weights = tf.constant(np.random.default_rng(0).normal(size=(4, 3)).astype("float32"))

    @tf.function(input_signature=[tf.TensorSpec((1, 4), name="x")])
    def serve(x):
        return {"y": x @ weights}

    converter = tf.lite.TFLiteConverter.from_concrete_functions([serve.get_concrete_function()])
    return converter.convert()


def test_a_file_is_read_and_written(flatbuffer, content):
    model = flatbuffer.read_model(content)
    codes = [model.operatorCodes[o.opcodeIndex].builtinCode for o in model.subgraphs[0].operators]
    assert codes == [flatbuffer.schema.BuiltinOperator.FULLY_CONNECTED], GONE
    again = flatbuffer.read_model(flatbuffer.write_model(model))
    assert [t.name for t in again.subgraphs[0].tensors] == [
        t.name for t in model.subgraphs[0].tensors
    ], GONE


def test_a_model_with_ranges_is_quantized(flatbuffer, content):
    model = flatbuffer.read_model(content)
    graph = model.subgraphs[0]
    for index in (*graph.inputs, *graph.outputs):
        ranges = flatbuffer.schema.QuantizationParametersT(min=[-4.0], max=[4.0])
        graph.tensors[index].quantization = ranges
    try:
        quantized = flatbuffer.read_model(flatbuffer.quantize_model(model))
    except Exception as error:
        pytest.fail(f"{GONE}{type(error).__name__}: {error}")
    types = [tensor.type for tensor in quantized.subgraphs[0].tensors]
    assert flatbuffer.schema.TensorType.INT8 in types, GONE
