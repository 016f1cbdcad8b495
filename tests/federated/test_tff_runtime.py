"""The worker process that TFF runs in."""

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.federated.engine import worker as worker_module

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


ROUND = """
import os, signal, sys, numpy as np, keras, keras_lp as lp
from keras_lp.federated.engine import installation, worker as worker_module
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
lp.FederatedAveraging(model).fit({"a": (np.ones((4, 2), "float32"), np.ones(4, "float32"))}, 1)
worker = [p for p in os.listdir("/proc") if p.isdigit() and b"worker_binary" in
          open(f"/proc/{p}/cmdline", "rb").read() and
          f"PPid:\\t{os.getpid()}\\n" in open(f"/proc/{p}/status").read()]
print("worker", *worker, flush=True)
END
"""


@pytest.mark.parametrize(
    "end",
    ["", "raise SystemExit(3)", "os.kill(os.getpid(), signal.SIGTERM)",
     "os.kill(os.getpid(), signal.SIGKILL)"],
    ids=["exit", "exception", "SIGTERM", "SIGKILL"],
)  # fmt: skip
def test_no_worker_is_left_and_no_pipe_held(end):
    """The pipe closes (else `communicate` would time out) and the worker's pid is gone."""
    process = subprocess.run(
        [sys.executable, "-c", ROUND.replace("END", end)],
        capture_output=True, timeout=120, text=True, check=False,
    )  # fmt: skip
    line = process.stdout.splitlines()[-1].split()
    assert line[0] == "worker"
    assert len(line) == 2
    assert "Exception ignored" not in process.stderr
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_alive(int(line[1])):
        time.sleep(0.05)
    assert not _is_alive(int(line[1]))


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_worker_is_started_again(mlp, digits):
    model = lp.transfer_model(mlp(), 10)
    federated = lp.FederatedAveraging(model)
    federated.fit({"only": digits}, 1, verbose=0)
    worker = worker_module.load_worker()
    first = worker.process.pid
    worker.end()
    federated.fit({"only": digits}, 1, verbose=0)
    assert worker.process.pid != first


@pytest.mark.parametrize("deaths", [1, 2, 9])
def test_a_worker_killed_while_it_starts_is_started_again(digits, monkeypatch, deaths):
    """Before it answers, and once more; as in a round, not without end."""
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        models.append(model)
    lp.FederatedAveraging(models[0]).fit({"only": digits}, 1, verbose=0)
    worker, left, start = worker_module.load_worker(), [deaths], subprocess.Popen
    worker.end()

    def killed(*arguments, **options):
        process = start(*arguments, **options)
        if left[0] and "worker_binary" in str(arguments):
            left[0] -= 1
            process.kill()
        return process

    monkeypatch.setattr(worker_module.subprocess, "Popen", killed)
    restarts, federated = worker.restarts, lp.FederatedAveraging(models[1])
    if deaths == 9:
        with pytest.raises(RuntimeError, match="4 deaths in one"):
            federated.fit({"only": digits}, 1, verbose=0)
        monkeypatch.undo()
    federated.fit({"only": digits}, 1, verbose=0)
    if deaths < 9:
        assert worker.restarts == restarts + 1 + deaths
    for one, other in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_worker_killed_between_rounds_and_at_the_end(digits):
    worker, killed = worker_module.load_worker(), []

    def kill(epoch, logs):
        if epoch == 0:
            os.kill(worker.process.pid, signal.SIGKILL)
            killed.append(worker.process.pid)

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callback = keras.callbacks.LambdaCallback(on_epoch_end=kill)
    history = lp.FederatedAveraging(model).fit({"only": digits}, 3, callbacks=callback, verbose=0)
    assert history.epoch == [0, 1, 2]
    assert worker.process.pid not in killed
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.end()
    worker.end()
    assert worker.process.poll() is not None


def test_at_exit_the_channel_is_closed_before_the_worker_is_killed():
    """gRPC starts a thread when its worker goes; Python 3.12 refuses that at exit."""
    left, worker = mock.Mock(), worker_module.Worker()
    worker._channel, worker.process = left.channel, left.process
    left.process.poll.return_value = None
    worker._leave()
    names = [name for name, *_ in left.mock_calls]
    assert names.index("channel.close") < names.index("process.kill")
    atexit.unregister(worker._leave)


@pytest.mark.parametrize("own", [None, "0"])
def test_the_worker_has_onednn_on_unless_the_user_says_no(monkeypatch, own):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if own is not None:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", own)
    worker = worker_module.Worker()
    try:
        worker.stub()
        environment = Path(f"/proc/{worker.process.pid}/environ").read_bytes().split(b"\0")
    finally:
        worker.end()
    assert f"TF_ENABLE_ONEDNN_OPTS={own or 1}".encode() in environment


THREADS = """
import threading, numpy as np, keras, keras_lp as lp
def work():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    data = {"a": (np.ones((4, 2), "float32"), np.ones(4, "float32"))}
    lp.FederatedAveraging(model).fit(data, 2, verbose=0)
    print("done")
threads = [threading.Thread(target=work) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_two_threads_may_start_at_once():
    result = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.count("done") == 2, result.stderr[-2000:]
