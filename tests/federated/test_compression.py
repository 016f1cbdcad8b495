"""Smaller updates: what is packed, what the server reads, and how many bytes are sent."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import keras_lp as lp
from keras_lp.federated.engine import installation

UPDATE = [
    np.random.default_rng(0).normal(size=(7, 5)).astype("float32"),
    np.random.default_rng(1).normal(size=(5,)).astype("float32"),
    np.float32(0.3) * np.ones((), "float32"),
]
SHAPES = [one.shape for one in UPDATE]
WAYS = [lp.Quantize(8), lp.Quantize(4), lp.Quantize(1), lp.TopK(0.1), lp.TopK(1.0), lp.TopK(1e-9)]


def unpacked(way, seed=0):
    return way.unpack(way.pack(UPDATE, seed), SHAPES)


def restored(way, seed=(0, 1)):
    tensors = [tf.constant(one) for one in UPDATE]
    return [one.numpy() for one in way.restored(tensors, tf.constant(seed))]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_size_is_that_of_the_packed_bytes(way):
    assert len(way.pack(UPDATE)) == way.size(SHAPES)
    assert [one.shape for one in unpacked(way)] == SHAPES


def test_sizes_by_hand():
    # 41 entries; two float32 for each of three arrays
    assert lp.Quantize(8).size(SHAPES) == 41 + 24
    assert lp.Quantize(4).size(SHAPES) == 18 + 3 + 1 + 24
    assert lp.Quantize(1).size(SHAPES) == 5 + 1 + 1 + 24
    assert lp.TopK(0.1).size(SHAPES) == 4 * 4 + 3  # 4 values, 4 places of 6 bits
    assert lp.TopK(1e-9).size(SHAPES) == 4 + 1


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0, 1e-9])
def test_the_largest_entries_are_kept(fraction):
    flat = np.concatenate([one.ravel() for one in UPDATE])
    kept = max(1, round(fraction * 41))
    expected = np.where(np.abs(flat) >= np.sort(np.abs(flat))[-kept], flat, 0)
    for found in (unpacked(lp.TopK(fraction)), restored(lp.TopK(fraction))):
        np.testing.assert_array_equal(np.concatenate([one.ravel() for one in found]), expected)


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_rounding_is_to_few_numbers_and_right_in_the_mean(bits):
    for read, seeds in ((unpacked, range(400)), (restored, [(i, 3) for i in range(400)])):
        draws = [read(lp.Quantize(bits), seed) for seed in seeds]
        for i, one in enumerate(UPDATE):
            values = np.array([draw[i] for draw in draws])
            step = (one.max() - one.min()) / (2**bits - 1)
            assert len(np.unique(values.round(5))) <= 2**bits
            assert np.abs(values - one).max() <= step * (1 + 1e-4)
            np.testing.assert_allclose(values.mean(0), one, atol=5 * step / 2 / 20 + 1e-5)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays("float32", hnp.array_shapes(max_dims=2, max_side=9),
               elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(WAYS),
)  # fmt: skip
def test_any_update_survives_packing(array, way):
    content = way.pack([array])
    assert len(content) == way.size([array.shape])
    (found,) = way.unpack(content, [array.shape])
    assert np.isfinite(found).all()
    if isinstance(way, lp.Quantize):
        step = (float(array.max()) - float(array.min())) / (2**way.bits - 1)
        assert np.abs(found.astype("float64") - array).max() <= 1.001 * step + 1e-6 * 1e6
    else:
        assert set(found.ravel()) <= {0.0, *array.ravel()}


@pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
@pytest.mark.parametrize("way", [lp.TopK(0.4), lp.Quantize(8), None], ids=str)
def test_a_round_averages_what_the_server_reads(way):
    rng = np.random.default_rng(3)
    clients = {
        name: (rng.normal(size=(n, 6)).astype("float32"), rng.normal(size=n).astype("float32"))
        for name, n in {"a": 5, "b": 12, "c": 31}.items()
    }

    def make():
        layer = keras.layers.Dense(1)
        model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Reshape(())])
        layer.set_weights([np.ones((6, 1)), np.zeros(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    start, sums = make().get_weights(), 0
    shapes = [one.shape for one in start]
    for name, data in clients.items():
        model = make()
        lp.FederatedAveraging(model, batch_size=None).fit({name: data}, 1, verbose=0)
        update = [a - b for a, b in zip(model.get_weights(), start, strict=True)]
        if isinstance(way, lp.TopK):
            update = way.unpack(way.pack(update), shapes)
        sums += len(data[1]) * np.concatenate([one.ravel() for one in update])
    model = make()
    federated = lp.FederatedAveraging(model, batch_size=None, compression=way)
    history = federated.fit(clients, 1, verbose=0).history
    change = np.concatenate(
        [(a - b).ravel() for a, b in zip(model.get_weights(), start, strict=True)]
    )
    step = np.abs(sums).max() / 48 / 255 * 6 if isinstance(way, lp.Quantize) else 0
    np.testing.assert_allclose(change, sums / 48, atol=1e-6 + step)
    assert history["bytes_up"] == [3 * (28 if way is None else way.size(shapes))]
    assert history["bytes_down"] == [3 * 28]


@pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
def test_error_feedback_sends_later_what_was_not_sent(tmp_path):
    """Rounds of gradient descent on a linear model in NumPy; training goes on after a restart."""
    rng, rate, way = np.random.default_rng(3), 0.05, lp.TopK(0.3, error_feedback=True)
    clients = {
        name: (rng.normal(size=(n, 6)).astype("float32"), rng.normal(size=n).astype("float32"))
        for name, n in {"a": 5, "b": 12, "c": 31}.items()
    }

    def federation():
        layer = keras.layers.Dense(1)
        model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Reshape(())])
        layer.set_weights([np.ones((6, 1)), np.zeros(1)])
        model.compile(keras.optimizers.SGD(rate), "mse")
        return lp.FederatedAveraging(model, batch_size=None, compression=way)

    weights, kept = np.r_[np.ones(6), 0.0], {name: np.zeros(7) for name in clients}
    for _ in range(5):
        total = 0
        for name, (x, y) in clients.items():
            columns = np.column_stack([x, np.ones(len(x))]).astype("float64")
            whole = rate * 2 * columns.T @ (columns @ weights - y) / len(x) + kept[name]
            sent = np.where(np.abs(whole) >= np.sort(np.abs(whole))[-2], whole, 0)
            kept[name] = whole - sent
            total = total + len(x) * sent
        weights = weights - total / 48
    for rounds in (3, 2):
        federated = federation()
        federated.fit(clients, 3, checkpoint_dir=tmp_path, verbose=0)
        if rounds == 2:
            history = federated.fit(clients, 2, checkpoint_dir=tmp_path, verbose=0)
    found = np.concatenate([one.ravel() for one in federated.model.get_weights()])
    np.testing.assert_allclose(found, weights, atol=1e-5)
    for name, expected in kept.items():
        np.testing.assert_allclose(federated._personal.values(name), expected, atol=1e-5)
    assert history.history["bytes_up"] == [3 * way.size([(6, 1), (1,)])] * 2
    with pytest.raises(ValueError, match="in a federation with personal layers"):
        federated.client_model("a")


def test_settings_are_shown():
    assert repr(lp.TopK(0.1)) == "TopK(fraction=0.1)"
    assert repr(lp.TopK(0.1, error_feedback=True)) == "TopK(fraction=0.1, error_feedback=True)"
    assert repr(lp.Quantize()) == "Quantize(bits=8)"
    assert not lp.Quantize().error_feedback


def test_wrong_settings(mlp):
    with pytest.raises(ValueError, match="`fraction` must be above 0 and at most 1"):
        lp.TopK(0)
    with pytest.raises(ValueError, match=r"`bits` must be one of \[8, 4, 1\]"):
        lp.Quantize(2)
    model = lp.transfer_model(mlp(), 10, optimizer="sgd")
    with pytest.raises(TypeError, match=r"must be lp\.Quantize or lp\.TopK"):
        lp.FederatedAveraging(model, compression=8)
    privacy = lp.DifferentialPrivacy(epsilon=1, delta=1e-3)
    with pytest.raises(ValueError, match="after the updates were sent"):
        lp.FederatedAveraging(model, compression=lp.Quantize(), privacy=privacy)
