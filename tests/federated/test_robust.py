"""Robust aggregations against NumPy and SciPy, and bad clients that they withstand."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.federated.engine.robust import robust_mean

_rng = np.random.default_rng(7)
CLIENTS = {
    f"c{i}": (_rng.normal(size=(n, 3)).astype("float32"), _rng.normal(size=n).astype("float32"))
    for i, n in enumerate([5, 12, 3, 8, 9, 4, 7, 6, 11, 10, 2])
}
WAYS = ["median", "trimmed_mean", "krum"]


def krum(rows):
    """Blanchard et al., 2017, section 3, with f a fifth of the clients."""
    count = len(rows)
    nearest = max(count - int(0.2 * count) - 2, 1)
    scores = [
        np.sort([np.sum((one - other) ** 2) for j, other in enumerate(rows) if j != i])[
            :nearest
        ].sum()
        for i, one in enumerate(rows)
    ]
    return rows[int(np.argmin(scores))]


ORACLES = {
    "median": lambda rows: np.median(rows, axis=0),
    "trimmed_mean": lambda rows: stats.trim_mean(rows, 0.2, axis=0),
    "krum": krum,
}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 25), st.integers(0, 2**31), st.sampled_from(WAYS))
def test_the_mean_is_that_of_numpy(count, seed, way):
    rng = np.random.default_rng(seed)
    updates = [rng.normal(size=(count, 2, 3)), rng.normal(size=(count, 4)), rng.normal(size=count)]
    present = rng.random(count) < 0.8
    present[rng.integers(count)] = True
    found = robust_mean([tf.constant(one, tf.float32) for one in updates], present, way)
    rows = np.concatenate([one.reshape(count, -1) for one in updates], 1)[present]
    expected = ORACLES[way](rows) if len(rows) > 1 else rows[0]
    np.testing.assert_allclose(
        np.concatenate([one.numpy().ravel() for one in found]), expected, atol=1e-5
    )
    assert [one.shape for one in found] == [(2, 3), (4,), ()]


@pytest.mark.parametrize("way", WAYS)
def test_no_update_gives_nan(way):
    (found,) = robust_mean([tf.zeros([3, 2])], tf.constant([False] * 3), way)
    assert np.isnan(found).all()


def make():
    layer = keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Reshape(())])
    layer.set_weights([np.ones((3, 1)), np.zeros(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def flat(model):
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


START = np.array([1.0, 1.0, 1.0, 0.0])


def change_of(clients, **arguments):
    model = make()
    lp.FederatedAveraging(model, batch_size=None, **arguments).fit(clients, 1, verbose=0)
    return flat(model) - START


def updates(clients):
    """The updates of one step of gradient descent, `(clients, 4)`."""
    found = []
    for x, y in clients.values():
        x = np.column_stack([x, np.ones(len(x))]).astype("float64")
        found.append(-0.1 * 2 * x.T @ (x @ START - y) / len(x))
    return np.array(found)


needs_tff = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


@needs_tff
@pytest.mark.parametrize("way", WAYS)
def test_a_round_combines_the_updates_of_the_clients(way):
    change = change_of(CLIENTS, aggregation=way)
    np.testing.assert_allclose(change, ORACLES[way](updates(CLIENTS)), atol=1e-5)


@needs_tff
@pytest.mark.filterwarnings("ignore:Round 1. the updates of 1 of 12 clients were not finite")
@pytest.mark.parametrize("size", [1e6, 1e30])
def test_bad_clients_move_only_the_mean(size):
    bad = {
        f"bad{i}": (size * np.ones((4, 3), "float32"), np.zeros(4, "float32"))
        for i in range(1 if size > 1e10 else 2)
    }
    everyone = {**CLIENTS, **bad}
    largest = np.abs(updates(CLIENTS)).max(0)
    if size < 1e10:
        assert (np.abs(change_of(everyone)) > 1e3 * largest).any()
    for way in WAYS:
        assert (np.abs(change_of(everyone, aggregation=way)) <= largest + 1e-6).all()


def test_what_is_refused(mlp):
    model = lp.transfer_model(mlp(), 10, optimizer="sgd")
    with pytest.raises(ValueError, match="Did you mean 'median'"):
        lp.FederatedAveraging(model, aggregation="medan")
    for arguments in (
        {"weighting": "examples"},
        {"privacy": lp.DifferentialPrivacy(epsilon=1, delta=1e-3)},
    ):
        with pytest.raises(ValueError, match="weights clients equally, for one task"):
            lp.FederatedAveraging(model, aggregation="krum", **arguments)
    several = lp.multitask_model(mlp(), {"a": 2, "b": 2}, optimizer="sgd")
    with pytest.raises(ValueError, match="and 2 tasks"):
        lp.FederatedAveraging(several, aggregation="krum")
