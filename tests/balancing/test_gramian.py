"""Weights from Gramians: by hand, by scipy, and what holds for every method."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from keras_lp.balancing import gramian as g

CYCLIC = [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def cyclic(gramian):
    return g.pcgrad_weights(gramian, np.array([np.roll(range(len(gramian)), -i)
                                               for i in range(len(gramian))]))  # fmt: skip


METHODS = {
    "pcgrad": tf.function(cyclic),
    "mgda": tf.function(g.mgda_weights),
    "cagrad": tf.function(lambda gramian, c=0.5: g.cagrad_weights(gramian, c)),
    "imtl_g": tf.function(g.imtl_weights),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def gramian_of(gradients):
    gradients = np.asarray(gradients, "float32")
    return keras.ops.convert_to_tensor(gradients @ gradients.T)


def weights_of(method, gradients):
    return np.asarray(method(gramian_of(gradients)))


def random_gradients(seed, tasks, size=12, spread=0.5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tasks, size)) * np.exp(spread * rng.normal(size=(tasks, 1)))


@every_method
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_tasks_of_one_gradient_get_the_plain_sum(method, tasks):
    gradients = np.tile(random_gradients(0, 1), (tasks, 1))
    update = weights_of(method, gradients) @ gradients
    length = 1.5 if method is METHODS["cagrad"] else 1.0  # 1 + c
    np.testing.assert_allclose(update, length * gradients.sum(0), rtol=2e-3)


@every_method
def test_scaling_all_gradients_changes_no_weight(method):
    gradients = random_gradients(1, 3)
    np.testing.assert_allclose(
        weights_of(method, 1000 * gradients), weights_of(method, gradients), rtol=1e-3
    )


@every_method
def test_an_absent_task_changes_nothing_for_the_others(method):
    gradients = random_gradients(2, 2)
    with_absent = np.insert(gradients, 1, 0.0, axis=0)
    weights = weights_of(method, with_absent)
    assert weights[1] == 0
    np.testing.assert_allclose(weights[[0, 2]], weights_of(method, gradients), rtol=1e-3, atol=1e-5)


@every_method
def test_no_gradient_at_all_gives_no_nan(method):
    np.testing.assert_array_equal(weights_of(method, np.zeros((3, 4))), np.zeros(3))


@pytest.mark.parametrize("name", ["mgda", "cagrad", "imtl_g"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_the_tasks_does_not_matter(name, seed):
    gradients = random_gradients(seed, 4)
    order = np.random.default_rng(seed).permutation(4)
    weights = weights_of(METHODS[name], gradients)
    again = weights_of(METHODS[name], gradients[order])
    np.testing.assert_allclose(again @ gradients[order], weights @ gradients, atol=0.05)


@pytest.mark.parametrize("name", ["pcgrad", "mgda", "imtl_g"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_two_tasks_do_not_conflict_with_the_update(name, seed):
    """MGDA and IMTL-G hold for any number; PCGrad looks at pairs, so at two."""
    gradients = random_gradients(seed, 2, size=3)
    update = weights_of(METHODS[name], gradients) @ gradients
    assert (gradients @ update >= -1e-3 * np.linalg.norm(gradients, axis=1)).all()


# By hand


def test_pcgrad_of_two_conflicting_gradients():
    """g1 = (1, 0) and g2 = (-1, 1): g1 becomes (1/2, 1/2), g2 becomes (0, 1)."""
    gradients = np.array([[1.0, 0.0], [-1.0, 1.0]])
    np.testing.assert_allclose(
        weights_of(METHODS["pcgrad"], gradients) @ gradients, [0.5, 1.5], rtol=1e-6
    )


def test_pcgrad_without_conflict_is_the_sum():
    weights = weights_of(METHODS["pcgrad"], [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    np.testing.assert_allclose(weights, [1, 1, 1], rtol=1e-6)


def test_pcgrad_equals_projections_one_by_one():
    gradients = random_gradients(5, 3, size=2)
    expected = np.zeros(2)
    for i, order in enumerate(CYCLIC):
        own = gradients[i].copy()
        for j in order:
            if j != i and own @ gradients[j] < 0:
                own -= own @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        expected += own
    np.testing.assert_allclose(
        weights_of(METHODS["pcgrad"], gradients) @ gradients, expected, rtol=1e-4
    )


def test_mgda_of_two_gradients_in_closed_form():
    """The foot of the perpendicular from 0 to the line through both."""
    a, b = gradients = np.array([[2.0, 0.0], [0.0, 1.0]])
    share = (b - a) @ b / ((a - b) @ (a - b))
    np.testing.assert_allclose(
        weights_of(METHODS["mgda"], gradients), [2 * share, 2 * (1 - share)], atol=1e-3
    )


def test_imtl_of_two_orthogonal_gradients():
    """Lengths 2 and 1: weights in the ratio 1 to 2 make both ways equally long."""
    weights = weights_of(METHODS["imtl_g"], [[2.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(weights, [2 / 3, 4 / 3], rtol=1e-3)


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_imtl_goes_equally_far_along_each_gradient(tasks):
    gradients = random_gradients(7, tasks)
    update = weights_of(METHODS["imtl_g"], gradients) @ gradients
    ways = gradients @ update / np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(ways, ways[0], rtol=1e-3)


def test_imtl_takes_no_note_of_the_scale_of_one_task():
    gradients = random_gradients(8, 3)
    scaled = gradients * [[1.0], [50.0], [1.0]]
    update, again = (weights_of(METHODS["imtl_g"], each) @ each for each in (gradients, scaled))
    cosine = update @ again / np.linalg.norm(update) / np.linalg.norm(again)
    assert cosine == pytest.approx(1, abs=1e-3)


def test_cagrad_of_nothing_is_the_plain_sum():
    weights = weights_of(lambda m: METHODS["cagrad"](m, 0.0), random_gradients(9, 3))
    np.testing.assert_allclose(weights, np.ones(3), rtol=1e-5)


def test_cagrad_from_afar_points_where_mgda_does():
    gradients = random_gradients(10, 3, spread=0.1)
    far = weights_of(lambda m: METHODS["cagrad"](m, 100.0), gradients) @ gradients
    mgda = weights_of(METHODS["mgda"], gradients) @ gradients
    cosine = far @ mgda / np.linalg.norm(far) / np.linalg.norm(mgda)
    assert cosine == pytest.approx(1, abs=1e-2)


# By an independent solver


def on_simplex(function, tasks):
    return minimize(
        function,
        np.full(tasks, 1 / tasks),
        bounds=[(0, 1)] * tasks,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tasks", [3, 6])
def test_mgda_is_as_short_as_scipy_finds(seed, tasks):
    gradients = random_gradients(seed, tasks, size=8)
    weights = weights_of(METHODS["mgda"], gradients) / tasks
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    best = on_simplex(lambda w: np.sum((w @ gradients) ** 2), tasks)
    scale = np.mean(np.sum(gradients**2, axis=1))
    assert np.sum((weights @ gradients) ** 2) - best.fun < 1e-3 * scale


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tasks", [3, 6])
def test_cagrad_helps_the_worst_task_as_much_as_scipy_finds(seed, tasks):
    """The update maximises min_i <g_i, d> within the ball: checked on that, not on its dual."""
    gradients = random_gradients(seed, tasks, size=8)
    mean = gradients.mean(0)
    radius = 0.5 * np.linalg.norm(mean)
    dual = on_simplex(
        lambda w: w @ gradients @ mean + radius * np.linalg.norm(w @ gradients), tasks
    )
    update = weights_of(METHODS["cagrad"], gradients) @ gradients / tasks
    assert np.linalg.norm(update - mean) == pytest.approx(radius, rel=1e-3)
    scale = np.mean(np.sum(gradients**2, axis=1))
    assert (gradients @ update).min() >= dual.fun - 0.01 * scale


def test_the_mean_cosine_is_over_the_pairs_that_are_there():
    cosine, pairs = g.mean_cosine(gramian_of([[1.0, 0.0], [0.0, 0.0], [-3.0, 0.0], [0.0, 2.0]]))
    assert float(pairs) == 3
    assert float(cosine) == pytest.approx(-1 / 3)
