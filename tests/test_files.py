"""A full disk: an error with the path, and no half file."""

import contextlib
import re
import resource
import signal
import tempfile

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.federated.engine.files import write_rows, write_tensor
from keras_lp.tflite.contents import write_whole
from keras_lp.utils.files import whole_file

LIMIT = 50  # bytes


@contextlib.contextmanager
def full_disk():
    """Within it no file of this process grows beyond a few bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def adapted(mlp):
    return lp.finetune_model(lp.transfer_model(mlp(), 10), lora=lp.LoRA(rank=2))


def trainer(mlp, folder):
    pytest.importorskip("ai_edge_litert.interpreter")
    lp.export_trainable_tflite(lp.transfer_model(mlp(), 10), folder / "m.tflite")
    return lp.DeviceTrainer(folder / "m.tflite")


def adapters_writer(mlp, folder):
    model = adapted(mlp)
    return lambda path: lp.save_adapters(model, path)


WRITERS = {
    "whole_file": lambda mlp, folder: lambda path: write(path, bytes(1000)),
    "adapters": adapters_writer,
    "tflite": lambda mlp, folder: lambda path: write_whole(path, bytes(1000)),
    "device weights": lambda mlp, folder: trainer(mlp, folder).save_weights,
}


def write(path, content):
    with whole_file(path) as file:
        file.write(content)


@pytest.mark.parametrize("name", WRITERS)
def test_files_stay_as_they_were(name, mlp, tmp_path):
    path = tmp_path / "out" / "file.npz"
    path.parent.mkdir()
    writer = WRITERS[name](mlp, tmp_path)
    path.write_bytes(b"before")
    with full_disk(), pytest.raises(OSError, match=r"could not be written.*file\.npz"):
        writer(path)
    assert path.read_bytes() == b"before"
    assert [one.name for one in path.parent.iterdir()] == ["file.npz"]
    writer(path)
    assert path.stat().st_size > LIMIT


@pytest.mark.parametrize("write_file", [lp.export_tflite, lp.export_trainable_tflite])
def test_temporary_files_of_the_converter(write_file, mlp, tmp_path):
    pytest.importorskip("ai_edge_litert.interpreter")
    model = lp.transfer_model(mlp(), 10)
    folder = re.escape(tempfile.gettempdir())
    with full_disk(), pytest.raises(OSError, match=f"Temporary files.*{folder}"):
        write_file(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())
    write_file(model, tmp_path / "m.tflite")


@pytest.mark.parametrize("dtype", ["float32", "bool", "str"])
def test_rows_and_tensors_for_the_worker(tmp_path, dtype):
    rows = np.ones((100, 3), dtype)
    for writer in (lambda path: write_rows(path, [rows, rows]), lambda p: write_tensor(p, rows)):
        with full_disk(), pytest.raises(OSError, match=r"could not be written.*0\.rows"):
            writer(tmp_path / "0.rows")
    write_rows(tmp_path / "one.rows", [rows, rows])


def test_features_in_files(mlp, digits):
    model = lp.transfer_model(mlp(), 10, cache_memory=100)
    with full_disk(), pytest.raises(OSError, match=r"could not be written.*keras_lp_features"):
        model.fit(*digits, verbose=0)
    model.fit(*digits, verbose=0)


@pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
def test_a_round_of_a_federation(digits, tmp_path):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    federated, clients = lp.FederatedAveraging(model), lp.partition(digits, clients=5)
    federated.fit(clients, 1, checkpoint_dir=tmp_path, verbose=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(), pytest.raises(OSError, match=r"could not be written"):
        federated.fit(clients, 2, checkpoint_dir=tmp_path, verbose=0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    federated.fit(clients, 2, checkpoint_dir=tmp_path, verbose=0)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_keras_file_with_a_flipped_byte_is_named(mlp, tmp_path, place):
    path = tmp_path / "m.keras"
    lp.transfer_model(mlp(), 3).save(path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    for use in (lambda: lp.export_tflite(path, tmp_path / "m.tflite"),
                lambda: lp.transfer_model(path, 3)):  # fmt: skip
        with pytest.raises(ValueError, match=r"whole\. Received: .*m\.keras, which is damaged"):
            use()
