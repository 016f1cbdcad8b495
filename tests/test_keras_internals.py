"""What keras_lp uses of Keras beyond its public names still is what it was."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.utils import keras_internals as internals

GONE = (
    f"Keras {keras.__version__} has changed what keras_lp.utils.keras_internals uses. Find what "
    "the function does now, and change it there. "
)


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((4,), name="numbers")
    inner = keras.Sequential([keras.layers.Dense(3, name="a"), keras.layers.Dropout(0.5, name="b")])
    inner.name = "inner"
    outputs = keras.layers.Dense(2, name="c")(inner(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(np.ones((4, 4)), np.ones((4, 2)), verbose=0)
    return model


CHECKS = {
    "sublayers": lambda m: (
        [x.name for x in internals.sublayers(m, include_self=False)][:2] == ["numbers", "inner"]
    ),
    "sublayers of sublayers": lambda m: {"a", "b", "c"} < {x.name for x in internals.sublayers(m)},
    "direct_sublayers": lambda m: "a" in {x.name for x in internals.direct_sublayers(m.layers[1])},
    "own_trainable_variables": lambda m: (
        [v.name for v in internals.own_trainable_variables(m.layers[2])] == ["kernel", "bias"]
        and internals.own_trainable_variables(m) == []
    ),
    "own_variables": lambda m: (
        len(internals.own_variables(keras.layers.Dense(2))) == 0
        and len(internals.own_variables(m.layers[2])) == 2
    ),
    "draws_random_numbers": lambda m: (
        [internals.draws_random_numbers(x) for x in m.layers[1].layers] == [False, True]
    ),
    "takes_training": lambda m: (
        [internals.takes_training(x) for x in (keras.layers.ReLU(), keras.layers.Dropout(0.5))]
        == [False, True]
    ),
    "graph_of": lambda m: (
        isinstance(internals.graph_of(m.layers[1]), internals.Functional)
        and internals.graph_of(m) is m
    ),
    "producer": lambda m: internals.producer(m.output) is m.layers[2],
    "inputs_of_call": lambda m: (
        internals.inputs_of_call(m.output)[0] is m.layers[1].output
        or internals.producer(internals.inputs_of_call(m.output)[0]) is m.layers[1]
    ),
    "input_tensors_of_calls": lambda m: (
        internals.input_tensors_of_calls(m.layers[2]) == [internals.inputs_of_call(m.output)]
    ),
    "run_through_graph": lambda m: np.array_equal(
        internals.run_through_graph(m, np.ones((1, 4), "float32"), lambda operation: operation),
        m(np.ones((1, 4))),
    ),
    "standardize_inputs": lambda m: (
        np.shape(internals.standardize_inputs(m, np.ones((2, 4)))[0]) == (2, 4)
    ),
    "has_masks": lambda m: (
        not internals.has_masks([m.output])
        and internals.has_masks(
            [keras.layers.Embedding(3, 2, mask_zero=True)(keras.Input((5,), dtype="int32"))]
        )
    ),
    "compile_config": lambda m: internals.compile_config(m) is internals.compile_config(m),
    "compile_arguments": lambda m: internals.compile_arguments(m)["loss"] == "mse",
    "loss_tracker": lambda m: internals.loss_tracker(m).name == "loss",
    "loss_metrics": lambda m: internals.loss_metrics(m) == [],
    "flags_at_compile": lambda m: internals.flags_at_compile(m)[m.layers[2]] is True,
    "is_distributed": lambda m: not internals.is_distributed(m),
    "metric_direction": lambda m: (
        (
            internals.metric_direction(keras.metrics.BinaryAccuracy()),
            internals.metric_direction(keras.metrics.MeanSquaredError()),
        )
        == ("up", "down")
    ),
    "rate_of": lambda m: internals.rate_of(m.optimizer) is m.optimizer.learning_rate,
    "to_snake_case": lambda m: internals.to_snake_case("Conv2DTranspose") == "conv2d_transpose",
    "train_validation_split": lambda m: (
        [
            len(part[0])
            for part in internals.train_validation_split((np.arange(10),), validation_split=0.3)
        ]
        == [7, 3]
    ),
    "unscale_loss_for_distribution": lambda m: internals.unscale_loss_for_distribution(2.0) == 2.0,
    "BaseOptimizer": lambda m: isinstance(m.optimizer, internals.BaseOptimizer),
}


@pytest.mark.parametrize("name", CHECKS)
def test_keras_still_has_what_is_used(model, name):
    try:
        holds = CHECKS[name](model)
    except Exception as error:
        pytest.fail(f"{GONE}{name}: {type(error).__name__}: {error}")
    assert holds, f"{GONE}{name} gives another result."


def test_set_compile_config_replaces_the_object(model):
    before = internals.compile_config(model)
    twin = type(before)(**before.config)
    internals.set_compile_config(model, twin)
    assert internals.compile_config(model) is twin
    assert internals.compile_arguments(model)["loss"] == "mse", GONE


def test_decays_knows_what_is_excluded():
    optimizer = keras.optimizers.AdamW(weight_decay=0.1)
    one, other = keras.Variable(1.0, name="one"), keras.Variable(1.0, name="other")
    optimizer.exclude_from_weight_decay(var_list=[other])
    optimizer.build([one, other])
    assert [internals.decays(optimizer, v) for v in (one, other)] == [True, False], GONE


def test_untrack_variable_takes_it_from_the_layer():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    internals.untrack_variable(layer, layer.bias)
    assert [v.name for v in layer.weights] == ["kernel"], GONE


def test_masks_are_set_and_read():
    tensor = keras.ops.ones((2, 3))
    internals.set_keras_mask(tensor, keras.ops.ones((2,), "bool"))
    assert internals.get_keras_mask(tensor).shape == (2,), GONE


def test_private_names_of_keras_are_in_one_module():
    """No other module imports `keras.src` or uses the names that this module wraps."""
    wrapped = {
        node.attr
        for node in ast.walk(ast.parse(Path(internals.__file__).read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_")
    }
    assert "_flatten_layers" in wrapped
    found = []
    for path in Path(lp.__file__).parent.rglob("*.py"):
        if path == Path(internals.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras.src"):
                found.append(f"{path.name}:{node.lineno} {node.module}")
            if isinstance(node, ast.Attribute) and node.attr in wrapped:
                found.append(f"{path.name}:{node.lineno} {node.attr}")
    assert not found
