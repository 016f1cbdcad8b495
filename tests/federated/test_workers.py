"""Rounds on several workers: the same results, also when workers are killed, paused or slow."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def start(count):
    """Starts workers; returns their processes and addresses."""
    command = [sys.executable, "-m", "keras_lp.federated.worker", "--port", "0"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    lines = [process.stdout.readline().split() for process in processes]
    if any(line[:2] != ["ready", "on"] for line in lines):
        for process in processes:
            end(process)
        pytest.skip("needs network namespaces")
    return [(process, line[2]) for process, line in zip(processes, lines, strict=True)]


def end(process):
    process.terminate()
    process.wait(timeout=10)
    process.stdout.close()


def children(pid):
    """The descendants of a process."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True,
                            check=True).stdout  # fmt: skip
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in pairs if parent == one]
    return found[1:]


@pytest.fixture(scope="module")
def workers():
    """The addresses of two workers."""
    running = start(2)
    yield [address for _, address in running]
    for process, _ in running:
        end(process)


@pytest.fixture
def three():
    """Three workers of a test alone."""
    running = start(3)
    yield running
    for process, _ in running:
        for pid in children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        end(process)


@pytest.fixture(scope="module")
def clients():
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x = x[:400].reshape(-1, 64).astype("float32") / 255
    return lp.partition((x, y[:400]), clients=10, alpha=1.0, seed=0)


@pytest.fixture
def model(mlp):
    def make():
        keras.utils.set_random_seed(0)
        return lp.transfer_model(
            mlp((16,)), 10, pretrained=False, trainable="all", pooling=None, optimizer="sgd",
            learning_rate=0.1,
        )  # fmt: skip

    return make


def rows_on_workers():
    """The files with the data of clients in the folders of all workers."""
    return list(Path(tempfile.gettempdir()).glob("keras_lp_worker_*/*/*.rows"))


def folders():
    return {path.name for path in Path(tempfile.gettempdir()).glob("keras_lp_worker_*")}


def assert_equal(ours, theirs):
    for left, right in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"clients_per_round": 6, "local_epochs": 2},
        pytest.param({"aggregation": "median"}, marks=pytest.mark.slow),
        pytest.param({"compression": lp.Quantize(bits=4)}, marks=pytest.mark.slow),
        pytest.param(
            {"privacy": lp.DifferentialPrivacy(delta=1e-3, noise_multiplier=1.0, clip=0.5, seed=0)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mean", "robust", "compressed", "private"],
)
def test_two_workers_equal_one_machine(options, workers, clients, model):
    here, there = model(), model()
    before = here.get_weights()
    lp.FederatedAveraging(here, **options).fit(clients, rounds=3, verbose=0)
    federated = lp.FederatedAveraging(there, **options)
    folder = federated._rounds._folder
    with lp.federated_workers(workers):
        history = federated.fit(clients, rounds=3, verbose=0).history
        sent = [path for path in rows_on_workers() if path.parent.name == folder.name]
        sizes = [path.stat().st_size for path in sent]
        for path in sent:
            assert path.stat().st_mode & 0o077 == 0  # of this user alone
            assert path.parent.parent.stat().st_mode & 0o077 == 0
    assert min(sizes) > 0
    assert len(sizes) >= 8  # inputs and labels of four blocks
    assert {path.stat().st_size for path in sent} == {0}  # emptied at the end
    assert all(path.stat().st_size for path in folder.glob("*.rows"))
    assert np.abs(here.get_weights()[0] - before[0]).max() > 1e-3
    assert_equal(here, there)
    assert len(history["seconds"]) == 3


@pytest.mark.slow
def test_frozen_networks_heads_and_evaluation_on_workers(workers, clients, model):
    """Frozen weights and features reach the workers, and a federation moves between machines."""
    known = model()
    here, there = (lp.transfer_model(known, 10, pooling=None) for _ in range(2))
    x = np.concatenate([inputs for inputs, _ in clients.values()])
    lp.FederatedAveraging(here).fit_head(clients, tolerance=1e-9, verbose=0)
    federated = lp.FederatedAveraging(there)
    with lp.federated_workers(workers):
        federated.fit_head(clients, tolerance=1e-9, verbose=0)
        figures = federated.evaluate(clients, verbose=0)
    expected = here.predict(x, verbose=0)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(there.predict(x, verbose=0), expected, atol=1e-5)
    assert federated.evaluate(clients, verbose=0) == pytest.approx(figures, abs=1e-6)
    here, there = (lp.finetune_model(model(), optimizer="sgd", learning_rate=0.1) for _ in range(2))
    before = here.predict(x, verbose=0)
    lp.FederatedAveraging(here).fit(clients, rounds=2, verbose=0)
    federated = lp.FederatedAveraging(there)
    federated.fit(clients, rounds=1, verbose=0)
    with lp.federated_workers(workers[:1]):
        federated.fit(clients, rounds=1, verbose=0)
    moved = here.predict(x, verbose=0)
    assert np.abs(moved - before).max() > 1e-3
    np.testing.assert_allclose(there.predict(x, verbose=0), moved, atol=1e-5)


class Between(keras.callbacks.Callback):
    """Calls a function after the second round, while the third runs."""

    def __init__(self, function):
        super().__init__()
        self._function = function

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            threading.Timer(0.05, self._function).start()


def test_one_killed_one_paused_and_one_slow(three, clients, model):
    here, there = model(), model()
    options = {"local_epochs": 5, "batch_size": 5}
    lp.FederatedAveraging(here, **options).fit(clients, rounds=5, verbose=0)
    (killed, _), (paused, paused_address), (slow, _) = three

    def trouble():
        os.kill(killed.pid, signal.SIGKILL)
        for pid in children(killed.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children(paused.pid):
            os.kill(pid, signal.SIGSTOP)

    for pid in children(slow.pid):
        os.setpriority(os.PRIO_PROCESS, pid, 19)
    federated = lp.FederatedAveraging(there, **options)
    started = time.monotonic()
    with (
        pytest.warns(UserWarning, match=r"did not answer within 3 seconds and are left out"),
        lp.federated_workers([address for _, address in three], timeout=3.0),
    ):
        federated.fit(clients, rounds=5, callbacks=Between(trouble), verbose=0)
    assert time.monotonic() - started < 60
    assert_equal(here, there)
    # The paused worker takes part again once it answers.
    for pid in children(paused.pid):
        os.kill(pid, signal.SIGCONT)
    with lp.federated_workers([paused_address]):
        federated.fit(clients, rounds=1, verbose=0)


@pytest.mark.slow
def test_without_any_worker_the_run_ends_with_an_error_and_can_be_resumed(
    three, clients, model, tmp_path
):
    here, there = model(), model()
    lp.FederatedAveraging(here).fit(clients, rounds=4, verbose=0)
    process, address = three[0]

    def pause():
        for pid in children(process.pid):
            os.kill(pid, signal.SIGSTOP)

    federated = lp.FederatedAveraging(there)
    with lp.federated_workers([address], timeout=2.0):
        federated.fit(clients, rounds=2, checkpoint_dir=tmp_path, verbose=0)
        pause()
        with pytest.raises(ConnectionError, match="no answer from any of"):
            federated.fit(clients, rounds=2, checkpoint_dir=tmp_path, verbose=0)
    again = model()
    lp.FederatedAveraging(again).fit(clients, rounds=4, checkpoint_dir=tmp_path, verbose=0)
    assert_equal(here, again)


@pytest.mark.slow
def test_a_worker_whose_process_dies_starts_again(three, clients, model):
    process, address = three[0]
    federated = lp.FederatedAveraging(model())
    with lp.federated_workers([address]):
        federated.fit(clients, rounds=1, verbose=0)
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(process.pid)}
        (inner,) = [pid for pid, name in commands.items() if b"worker_binary\0--port" in name]
        os.kill(inner, signal.SIGKILL)
        federated.fit(clients, rounds=1, verbose=0)
    assert federated.rounds_done == 2


def test_a_worker_listens_on_its_address_alone_and_leaves_nothing():
    before = folders()
    left = Path(tempfile.gettempdir()) / "keras_lp_worker_999999999_x"  # of one that was killed
    left.mkdir()
    ((process, address),) = start(1)
    port = address.split(":")[1]
    pids = children(process.pid)
    assert not left.exists()
    assert len(folders() - before) == 1
    try:
        listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True)
        lines = [
            line for line in listening.stdout.splitlines() if any(f"pid={p}," in line for p in pids)
        ]
        assert [line.split()[3] for line in lines] == [f"127.0.0.1:{port}"]
    except FileNotFoundError:
        pass  # `ss` is not installed
    end(process)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert folders() <= before


def test_wrong_addresses():
    for addresses in ([], ["127.0.0.1"], ["127.0.0.1:1", "127.0.0.1:1"]):
        with (
            pytest.raises(ValueError, match='must be "host:port"'),
            lp.federated_workers(addresses),
        ):
            pass
    with (
        pytest.raises(ConnectionError, match=r"no answer from \['127.0.0.1:9'\]"),
        lp.federated_workers(["127.0.0.1:9"], timeout=1.0),
    ):
        pass
