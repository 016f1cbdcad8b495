"""Warnings point at the user's line, however deep they are raised."""

import warnings

import keras
import numpy as np
import pytest

import keras_lp as lp


def frozen_twice(net):
    lp.transfer_model(net, 2, trainable="all")
    return lambda: lp.transfer_model(net, 2)


def fine_tuned(net):
    kept = lp.finetune_model(net, 2)
    return lambda: (kept, lp.finetune_model(net, 2, trainable="head"))


def scaled_images(_):
    net = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Rescaling(1 / 255)])
    model = lp.transfer_model(net, 2)
    x = np.random.default_rng(0).uniform(size=(8, 4, 4, 1))
    return lambda: model.fit(x, np.arange(8) % 2, verbose=0)


def short_unfreezing(net):
    model = lp.finetune_model(net, 2)
    x, y = np.zeros((8, 64), "float32"), np.arange(8) % 2
    unfreezing = lp.GradualUnfreezing(epochs_per_block=9)
    return lambda: model.fit(x, y, verbose=0, callbacks=[unfreezing])


@pytest.mark.parametrize("prepare", [frozen_twice, fine_tuned, scaled_images, short_unfreezing])
def test_the_line_is_that_of_the_user(mlp, prepare):
    net = mlp()
    call = prepare(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert [one.filename for one in caught] == [__file__]
    assert caught[0].lineno in {line for *_, line in call.__code__.co_lines()}
