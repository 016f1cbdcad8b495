"""What phones send, averaged or refused."""

import io
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.tflite.device.device import write_weights
from keras_lp.tflite.device.exchange import model_version, named_weights
from keras_lp.tflite.training import training as training_module
from tests.conftest import assert_same, snapshot


@pytest.fixture
def model(mlp):
    return lp.transfer_model(mlp((4,), inputs=3), 2)


def update(model, change=0.0):
    """What a phone sends that trained the head."""
    exchanged = named_weights(model, model.trainable_variables)
    weights = {name: variable.numpy() + np.float32(change) for name, variable in exchanged.items()}
    return {**weights, "version": model_version(model, exchanged)}


def kernel(weights):
    return next(name for name in weights if name.endswith("kernel"))


def test_the_mean_is_weighted_and_written_into_the_model(model, tmp_path):
    start = snapshot(model)
    write_weights(tmp_path / "b.npz", update(model, 4.0))
    done = lp.aggregate_device_updates(
        model, [update(model, 1.0), tmp_path / "b.npz"], weights=[1, 2]
    )
    assert_same(start[:2], snapshot(model)[:2])  # the backbone
    for before, after in zip(start[2:4], snapshot(model)[2:4], strict=True):
        np.testing.assert_allclose(after, before + 3.0, atol=1e-6)  # (1 + 2 * 4) / 3
    assert done.accepted == (0, 1)
    assert done.refused == {}
    assert str(done) == "2 of 2 updates averaged"
    assert {name: value.tolist() for name, value in done.weights.items()} == {
        name: value.tolist() for name, value in update(model).items()
    }


def test_what_the_server_saves_is_what_phones_of_the_next_round_send(model, tmp_path):
    done = lp.aggregate_device_updates(model, [update(model, 1.0)])
    done.save(tmp_path / "next.npz")
    model.save(tmp_path / "server.keras")
    server = keras.models.load_model(tmp_path / "server.keras")
    assert lp.aggregate_device_updates(server, [tmp_path / "next.npz"]).accepted == (0,)
    assert_same(snapshot(model), snapshot(server))


def wrong_updates(model, folder):
    """`(update, reason)`."""
    good = update(model, 1.0)
    name = kernel(good)
    other = lp.transfer_model(
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "relu", name="block0")]), 2
    )
    (folder / "text.npz").write_text("no archive")
    (folder / "cut.npz").write_bytes(b"")
    np.savez(folder / "whole.npz", **good)
    content = (folder / "whole.npz").read_bytes()
    (folder / "half.npz").write_bytes(content[: len(content) // 2])
    np.savez(folder / "objects.npz", **{**good, name: np.array([{"a": 1}], dtype=object)})
    (folder / "pickle.npz").write_bytes(pickle.dumps(good))
    np.savez_compressed(folder / "bomb.npz", **{**good, name: np.zeros((2000, 2000), "float32")})
    with zipfile.ZipFile(folder / "names.npz", "w") as archive:
        archive.writestr("../evil.npy", b"")
    return [
        (folder / "absent.npz", "cannot be read"),
        (folder / "text.npz", "cannot be read"),
        (folder / "cut.npz", "cannot be read"),
        (folder / "half.npz", "cannot be read"),
        (folder / "objects.npz", "cannot be read"),
        (folder / "pickle.npz", "cannot be read"),
        (folder / "bomb.npz", "16,000,128 bytes"),
        (folder / "names.npz", "other arrays, such as '../evil'"),
        (None, "NoneType"),
        ({}, "other weights than this model"),
        ({**good, "w99_more": good[name]}, "other weights than this model"),
        ({n: v for n, v in good.items() if n != "version"}, "without"),
        ({**good, name: good[name].T}, "shape"),
        ({**good, name: good[name].astype("float64")}, "float64"),
        ({**good, name: good[name] * np.nan}, "not finite"),
        ({**good, name: good[name] + np.inf}, "not finite"),
        (update(other), "another model"),
        ({n: v for n, v in good.items() if "bias" not in n}, "another model"),
    ]


def test_wrong_updates_are_refused_with_the_reason_and_never_averaged(model, tmp_path):
    wrong = wrong_updates(model, tmp_path)
    start = snapshot(model)
    updates = [*(one for one, _ in wrong), update(model, 1.0)]
    with pytest.warns(UserWarning, match="Not averaged: update 0: it cannot be read"):
        done = lp.aggregate_device_updates(model, updates)
    assert done.accepted == (len(wrong),)
    for i, (_, reason) in enumerate(wrong):
        assert reason in done.refused[i], (i, done.refused[i])
    for before, after in zip(start[2:4], snapshot(model)[2:4], strict=True):
        np.testing.assert_array_equal(after, before + np.float32(1))
    assert "update 6 refused: " in str(done)


# Files that are made to break a reader


def npy(header):
    """An `.npy` file of a header alone."""
    content = header.encode()
    content += b" " * ((64 - (11 + len(content)) % 64) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content


def stored(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive_of(weights, **instead):
    """An `.npz` file of weights, some entries replaced by other bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in weights.items():
            archive.writestr(f"{name}.npy", instead.get(name, stored(value)))
    return file.getvalue()


def marked(content, local=None, central=None):
    """The archive with a byte of each local and each central header changed: `(place, value)`."""
    content = bytearray(content)
    for mark, edit in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = content.find(mark)
        while edit and at >= 0:
            content[at + edit[0]] = edit[1]
            at = content.find(mark, at + 4)
    return bytes(content)


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"
HOSTILE = {
    "encrypted": lambda good, name: marked(archive_of(good), (6, 1), (8, 1)),
    "unknown compression": lambda good, name: marked(archive_of(good), (8, 99), (10, 99)),
    "version 20": lambda good, name: marked(archive_of(good), None, (6, 200)),
    "10^13 numbers": lambda good, name: archive_of(good, **{name: npy(HEADER % 10**13)}),
    "10^30 numbers": lambda good, name: archive_of(good, **{name: npy(HEADER % 10**30)}),
    "-1 numbers": lambda good, name: archive_of(good, **{name: npy(HEADER % -1)}),
    "3000 signs": lambda good, name: archive_of(good, **{name: npy("-" * 3000 + "1")}),
    "3000 brackets": lambda good, name: archive_of(good, **{name: npy("[" * 3000)}),
    "breaks off": lambda good, name: archive_of(good, **{name: npy("{'descr': '<f4', ")}),
    "objects": lambda good, name: archive_of(
        good, **{name: npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }")}
    ),
    "no numbers": lambda good, name: archive_of(good, **{name: npy(HEADER % 8)}),
    "version 9": lambda good, name: archive_of(good, **{name: b"\x93NUMPY\x09\x00"}),
    "empty entry": lambda good, name: archive_of(good, **{name: b""}),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_and_bounded(model, tmp_path, make):
    good = update(model, 1.0)
    (tmp_path / "bad.npz").write_bytes(make(good, kernel(good)))
    tracemalloc.start()
    with pytest.warns(UserWarning, match="Not averaged: update 1"):
        done = lp.aggregate_device_updates(model, [good, tmp_path / "bad.npz"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.accepted == (0,)
    assert "bad.npz" in done.refused[1]
    assert peak < 2e6


@pytest.mark.parametrize("value", [[[1], [1, 2]], "text", None, {}, [object()]])
def test_a_dict_of_anything_else_is_refused(model, value):
    good = update(model, 1.0)
    with pytest.warns(UserWarning, match="Not averaged: update 1"):
        done = lp.aggregate_device_updates(model, [good, {**good, kernel(good): value}])
    assert done.accepted == (0,)


def mutated(content, good, rng):
    """The file with bytes changed, cut off or inserted, or with a header changed inside."""
    kind = rng.integers(4)
    if kind == 3:  # the archive is right, so that its checksum says nothing
        name = list(good)[rng.integers(len(good))]
        inner = bytearray(stored(good[name]))
        for _ in range(rng.integers(1, 4)):
            inner[rng.integers(len(inner) - good[name].nbytes)] = rng.integers(256)
        return archive_of(good, **{name: bytes(inner)})
    content = bytearray(content)
    place = int(rng.integers(len(content)))
    if kind == 0:
        for _ in range(rng.integers(1, 5)):
            content[rng.integers(len(content))] = rng.integers(256)
    elif kind == 1:
        del content[place : place + int(rng.integers(1, 64))]
    else:
        content[place:place] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(content)


def check_mutated(model, folder, count, seed):
    rng = np.random.default_rng(seed)
    good, start = update(model, 1.0), snapshot(model)
    content = archive_of(good)
    lp.aggregate_device_updates(model, [good])
    expected = snapshot(model)
    for first in range(0, count, 50):
        model.set_weights(start)
        paths = [folder / f"{first + i}.npz" for i in range(min(50, count - first))]
        for path in paths:
            path.write_bytes(mutated(content, good, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            done = lp.aggregate_device_updates(model, [good, *paths])
        assert len(done.accepted) + len(done.refused) == len(paths) + 1
        assert_same(expected, snapshot(model))  # what was accepted says the same


def test_mutated_updates_neither_end_the_round_nor_change_the_average(model, tmp_path):
    check_mutated(model, tmp_path, 200, seed=0)


@pytest.mark.slow
def test_many_mutated_updates(model, tmp_path):
    check_mutated(model, tmp_path, 4000, seed=1)


def test_an_update_of_the_last_round_is_stale(model):
    late = update(model, 5.0)
    lp.aggregate_device_updates(model, [update(model, 1.0)])
    start = snapshot(model)
    with pytest.raises(ValueError, match="update 0: it is stale"):
        lp.aggregate_device_updates(model, [late])
    assert_same(start, snapshot(model))


def test_updates_of_other_parts_of_the_model_are_not_mixed(model):
    with training_module._training_alone(model, "all"):
        whole = update(model)
    with pytest.warns(UserWarning, match="other weights than the first"):
        done = lp.aggregate_device_updates(model, [update(model), whole])
    assert done.accepted == (0,)


def test_wrong_calls_are_refused(model):
    good = update(model)
    with pytest.raises(ValueError, match="0 updates, none"):
        lp.aggregate_device_updates(model, [])
    with pytest.raises(ValueError, match="2 weights for 1 updates"):
        lp.aggregate_device_updates(model, [good], weights=[1, 2])
    with pytest.raises(ValueError, match="number above 0"):
        lp.aggregate_device_updates(model, [good], weights=[0])
    with pytest.raises(ValueError, match="must be finite"):
        lp.aggregate_device_updates(model, [good], weights=[float("inf")])
    with pytest.raises(TypeError, match="takes a Keras model"):
        lp.aggregate_device_updates("model.keras", [good])


# Updates that are finite but absurd


def heads_of(model):
    return np.concatenate([v.numpy().ravel() for v in model.trainable_variables])


def sent(model, changes):
    """Updates whose weights differ from those of the model by these numbers."""
    return [update(model, change) for change in changes]


def test_absurd_numbers_move_the_model_no_further_than_the_limit(model):
    start = heads_of(model)
    done = lp.aggregate_device_updates(model, sent(model, [1.0, 2.0, 2.0, 3.0, 1e30]))
    # Norms are the changes times a constant: the lower median is 2, so 1e30 counts as 20.
    np.testing.assert_allclose(heads_of(model), start + (1 + 2 + 2 + 3 + 20) / 5, rtol=1e-5)
    assert done.accepted == (0, 1, 2, 3, 4)
    assert list(done.limited) == [4]
    size = len(start) ** 0.5
    assert done.limited[4] == f"its norm of {1e30 * size:.3g} was scaled to {20 * size:.3g}"
    assert str(done).endswith(f"update 4 limited: {done.limited[4]}")


def test_a_claimed_number_of_examples_is_capped(model):
    start = heads_of(model)
    done = lp.aggregate_device_updates(model, sent(model, [1.0, 2.0, 4.0]), weights=[20, 30, 1e9])
    expected = (20 * 1 + 30 * 2 + 300 * 4) / 350
    np.testing.assert_allclose(heads_of(model), start + expected, rtol=1e-5)
    assert done.limited == {2: "its weight of 1e+09 was taken as 300"}


def test_limits_of_the_caller_and_none(model):
    start = heads_of(model)
    size = len(start) ** 0.5
    done = lp.aggregate_device_updates(
        model, sent(model, [1.0, 3.0]), weights=[1, 5], max_update_norm=2 * size, max_weight=3
    )
    np.testing.assert_allclose(heads_of(model), start + (1 + 3 * 2) / 4, rtol=1e-5)
    assert done.limited[1].count(";") == 1
    start = heads_of(model)
    done = lp.aggregate_device_updates(
        model, sent(model, [1.0, 1.0, 40.0]), weights=[1, 1, 98], max_update_norm=None,
        max_weight=None,
    )  # fmt: skip
    np.testing.assert_allclose(heads_of(model), start + 0.02 + 0.98 * 40, rtol=1e-5)
    assert done.limited == {}


def test_phones_that_did_not_train_set_no_limit(model):
    start = heads_of(model)
    done = lp.aggregate_device_updates(model, sent(model, [0.0, 0.0, 0.0, 2.0]))
    np.testing.assert_allclose(heads_of(model), start + 0.5, rtol=1e-5)
    assert done.limited == {}
    lp.aggregate_device_updates(model, sent(model, [0.0]))
    np.testing.assert_allclose(heads_of(model), start + 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("median", 2.0), ("trimmed_mean", 7 / 3), ("krum", 2.0)]
)
def test_robust_aggregations(model, aggregation, expected):
    start = heads_of(model)
    # Without a fifth at each end: 1.75, 2, 3.25. Nearest to its two neighbours: 2.
    lp.aggregate_device_updates(
        model, sent(model, [2.0, 1.75, -1e20, 1e20, 3.25]), aggregation=aggregation
    )
    np.testing.assert_allclose(heads_of(model), start + expected, rtol=1e-5)


def test_wrong_limits_and_aggregations(model):
    good = update(model)
    for wrong in ({"max_update_norm": 0}, {"max_weight": -1}, {"aggregation": "mode"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lp.aggregate_device_updates(model, [good], **wrong)
    with pytest.raises(ValueError, match="counts all updates equally"):
        lp.aggregate_device_updates(model, [good], weights=[1], aggregation="median")
