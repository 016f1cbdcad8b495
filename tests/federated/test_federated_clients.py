"""Who the clients are: populations that are loaded as they are sampled."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.federated import tff_runtime
from keras_lp.federated.engine import installation
from keras_lp.federated.engine.blocks import Work, rows_reader, rows_spec, to_blocks
from keras_lp.federated.engine.files import read_rows, write_rows

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def regression(rate=0.1):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


def client(number):
    rng = np.random.default_rng(number)
    return rng.normal(size=(3, 4)).astype("float32"), rng.normal(size=(3,)).astype("float32")


def test_of_ten_thousand_clients_only_the_sampled_are_loaded():
    loaded = []

    def load(number):
        loaded.append(number)
        return client(number)

    federated = lp.FederatedAveraging(regression(), clients_per_round=5, seed=3)
    federated.fit((range(10_000), load), rounds=4, verbose=0)
    assert len(loaded) == 20
    assert len(set(loaded)) > 15  # sampled from all of them, and again each round
    per_round = np.reshape(loaded, (4, 5))
    assert all(len(set(row)) == 5 for row in per_round)
    again = list(loaded)
    loaded.clear()
    same_seed = lp.FederatedAveraging(regression(), clients_per_round=5, seed=3)
    same_seed.fit((range(10_000), load), rounds=1, verbose=0)
    assert loaded == again[:5]


def test_client_data_of_tff_trains_as_a_mapping():
    tff = tff_runtime.load_tff()
    arrays = {f"c{i}": client(i) for i in range(3)}
    data = tff.simulation.datasets.TestClientData(
        {name: collections.OrderedDict(x=x, y=y) for name, (x, y) in arrays.items()}
    ).preprocess(lambda dataset: dataset.map(lambda row: (row["x"], row["y"])))
    models = [regression(), regression()]
    for model, clients in zip(models, (arrays, data), strict=True):
        lp.FederatedAveraging(model).fit(clients, 1, verbose=0)
    for a, b in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    raw = tff.simulation.datasets.TestClientData(
        {name: collections.OrderedDict(x=x, y=y) for name, (x, y) in arrays.items()}
    )
    with pytest.raises(ValueError, match=r"pairs \(x, y\).*dataset.map"):
        lp.FederatedAveraging(regression()).fit(raw, 1, verbose=0)


def test_a_bad_client_is_named_when_it_is_loaded():
    federated = lp.FederatedAveraging(regression())
    bad = {1: client(1), 2: (client(2)[0] * np.nan, client(2)[1])}
    with pytest.raises(ValueError, match=r"finite.*client 2"):
        federated.fit(([1, 2], bad.__getitem__), 1, verbose=0)
    for clients, error, message in [
        (([], client), ValueError, "at least one client"),
        (([1, 1], client), ValueError, "2 ids, 1 of them different"),
        ([client(1)], TypeError, r"\(ids, load\)"),
        (client(1), TypeError, "of type tuple"),
    ]:
        with pytest.raises(error, match=message):
            federated.fit(clients, 1, verbose=0)


def test_blocks_hold_all_clients_in_order_whatever_their_sizes(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 90, 57)
    numbers = np.arange(sizes.sum())
    x, words = np.stack([numbers, -numbers], axis=1), np.array([f"word {n}" for n in numbers])
    cuts = np.cumsum(sizes)[:-1]
    work = [
        Work((part, text), np.float32([len(part)]), np.int32([i, i]))
        for i, (part, text) in enumerate(zip(np.split(x, cuts), np.split(words, cuts), strict=True))
    ]
    blocks = [next(iter(b.as_numpy_iterator())) for b in to_blocks(work, 0.5, tmp_path)]
    assert len(blocks) in (2, 3)
    read = rows_reader(tmp_path, rows_spec(work[0].data))
    rows = [read(tf.constant(block["number"])) for block in blocks]
    np.testing.assert_array_equal(np.concatenate([one[0] for one in rows]), x)
    np.testing.assert_array_equal(np.concatenate([one[1] for one in rows]).astype(str), words)
    np.testing.assert_array_equal(np.concatenate([b["examples"] for b in blocks]), sizes)
    np.testing.assert_array_equal(np.concatenate([b["positions"] for b in blocks]), np.arange(57))
    assert {b["learning_rate"] for b in blocks} == {0.5}


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32"]
)
def test_rows_in_a_file_are_what_was_written(dtype, tmp_path):
    array = (
        np.random.default_rng(0).integers(0, 2, (7, 2, 3)).astype(tf.as_dtype(dtype).as_numpy_dtype)
    )
    write_rows(
        tmp_path / "rows", [array[:3], array[3:].transpose(0, 2, 1).copy().transpose(0, 2, 1)]
    )
    read = read_rows(str(tmp_path / "rows"), tf.TensorSpec((None, 2, 3), dtype))
    np.testing.assert_array_equal(read.numpy(), array)


def test_sample_weights_of_clients_count_as_in_keras():
    x, y = client(0)
    weights = np.array([0.0, 1.0, 3.0])
    model, central = regression(), regression()
    lp.FederatedAveraging(model, batch_size=None).fit({"a": (x, y, weights)}, 1, verbose=0)
    central.fit(x, y, sample_weight=weights, batch_size=3, verbose=0)
    for a, b in zip(model.get_weights(), central.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="Sample weights must be finite"):
        lp.FederatedAveraging(model).fit({"a": (x, y, -weights)}, 1, verbose=0)


def test_a_client_that_is_not_finite_counts_nothing_and_is_named():
    """Two good clients and one whose labels overflow: the result is that of the two."""
    good = {"a": client(1), "c": client(2)}
    huge = (client(3)[0] * 1e20, client(3)[1])
    with_bad, without = regression(), regression()
    federated = lp.FederatedAveraging(with_bad)
    with pytest.warns(UserWarning, match=r"Round 1: .*1 of 3 clients were not finite.*\['b'\]"):
        history = federated.fit({"a": good["a"], "b": huge, "c": good["c"]}, 1, verbose=0).history
    expected = lp.FederatedAveraging(without).fit(good, 1, verbose=0).history
    for a, b in zip(with_bad.get_weights(), without.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert (history["dropped"], history["clients"], expected["dropped"]) == ([1], [3], [0])
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    before = with_bad.get_weights()
    with pytest.warns(UserWarning, match=r"1 of 1 clients"):
        history = federated.fit({"b": huge}, 1, verbose=0).history
    for a, b in zip(with_bad.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isnan(history["loss"][0])


def test_an_unbatched_data_set_is_read_again_in_each_round():
    reads = []

    def rows():
        reads.append(1)
        yield from zip(*client(0), strict=True)

    spec = (tf.TensorSpec((4,), tf.float32), tf.TensorSpec((), tf.float32))
    data = {"a": tf.data.Dataset.from_generator(rows, output_signature=spec)}
    lp.FederatedAveraging(regression()).fit(data, 2, verbose=0)
    assert len(reads) == 2
