"""Heads that make up for what 8 bits shift."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.tflite.export import correction
from keras_lp.tflite.export.correction import affine_map, corrected_heads

pytest.importorskip("ai_edge_litert.interpreter")


def test_an_affine_change_of_outputs_is_found():
    wanted = np.random.default_rng(0).normal(size=(20_000, 3))
    matrix = np.array([[1.2, 0.1, 0.0], [0.0, 0.9, 0.0], [0.0, -0.2, 1.0]])
    shift = np.array([0.5, 0.0, -1.0])
    found, found_shift = affine_map((wanted - shift) @ np.linalg.inv(matrix), wanted)
    np.testing.assert_allclose(found, matrix, atol=2e-3)
    np.testing.assert_allclose(found_shift, shift, atol=2e-3)


def test_few_examples_change_little():
    given = np.array([[1.0, 0.0], [0.0, 1.0]])
    matrix, shift = affine_map(given, given + 1.2)
    np.testing.assert_allclose(shift, 0.2, atol=1e-12)  # 2 examples against 10
    np.testing.assert_allclose(matrix, np.eye(2), atol=1e-12)


@pytest.mark.parametrize("task", [3, lp.Regression(3, mean=[0, 100, 1e4], std=[1, 20, 1e3])])
def test_a_head_gives_the_map_of_its_output(mlp, digits, monkeypatch, task):
    model = lp.transfer_model(mlp(), task)
    before, weights = np.asarray(model(digits[0])), model.get_weights()
    matrix, shift = np.array([[1.1, 0, 0], [0, 0.9, 0], [0, 0, 1]]), np.array([1.0, 0, 3])
    monkeypatch.setattr(correction, "affine_map", lambda *_: (matrix, shift))
    with corrected_heads(model, [digits[0][:20]], 1):
        after = np.asarray(model(digits[0]))
    np.testing.assert_allclose(after, before @ matrix + shift, rtol=1e-4, atol=1e-4)
    for left, right in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)  # the user's model is as it was


def test_every_task_gets_its_own_map(mlp, digits, monkeypatch):
    """The file gives its outputs in another order than the model."""
    model = lp.multitask_model(mlp(), {"zebra": 3, "ant": 3})
    matched = []
    monkeypatch.setattr(
        correction,
        "affine_map",
        lambda given, wanted: matched.append((given, wanted)) or (np.eye(3), np.zeros(3)),
    )
    with corrected_heads(model, [digits[0][:20]], 1):
        pass
    for given, wanted in matched:
        np.testing.assert_allclose(given, wanted, atol=0.1)
    assert len(matched) == 2
    assert np.abs(matched[0][1] - matched[1][1]).max() > 0.3


def test_a_model_without_heads_is_left_as_it_is():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    weights = model.get_weights()
    with corrected_heads(model, [np.ones((4, 3))], 1):
        np.testing.assert_array_equal(model.get_weights()[0], weights[0])
