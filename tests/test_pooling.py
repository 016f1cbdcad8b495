"""How features become a vector by default."""

import keras
import numpy as np
import pytest

import keras_lp as lp


def network(*shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, keras.layers.Identity()(inputs))


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((8, 8, 64), 4096),  # the largest that becomes flat
        ((8, 8, 65), 65),
        ((1, 1, 5000), 5000),
        ((2, 3, 4), 24),
        ((None, 3, 4), 4),
        ((6, 4), 4),  # a sequence
        ((7,), 7),
    ],
)
def test_small_feature_maps_become_flat(shape, width):
    model = lp.transfer_model(network(*shape), 3)
    assert model.get_layer("features").output.shape == (None, width)


@pytest.mark.parametrize(("shape", "same"), [((2, 3, 4), "flatten"), ((8, 8, 65), "avg")])
def test_auto_equals_what_it_chooses(shape, same):
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype("float32")
    outputs = []
    for pooling in ("auto", same):
        model = lp.multitask_model(network(*shape), {"a": 2}, trainable="head", pooling=pooling)
        outputs.append(keras.Model(model.input, model.get_layer("features").output)(x))
    np.testing.assert_array_equal(*outputs)


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match=r"`pooling` must be one of \['auto', 'avg'.*flat'"):
        lp.transfer_model(network(2, 2, 1), 2, pooling="flat")
