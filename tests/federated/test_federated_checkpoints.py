"""A federation that is killed goes on."""

import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.checkpoints import Checkpoints
from keras_lp.federated.engine import installation

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)

_rng = np.random.default_rng(0)
CLIENTS = {
    i: (_rng.normal(size=(6, 3)).astype("float32"), _rng.normal(size=6).astype("float32"))
    for i in range(6)
}


def make(units=4, activation="relu", rate=0.1, **arguments):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(units, activation), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(keras.optimizers.SGD(rate), "mse")
    arguments = {"clients_per_round": 3, "server_optimizer": "adam", **arguments}
    return lp.FederatedAveraging(model, **arguments)


def fit(federated, rounds, folder, **arguments):
    history = federated.fit(CLIENTS, rounds, checkpoint_dir=folder, verbose=0, **arguments)
    return federated.model.get_weights(), history


def same(a, b, atol=1e-6):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, atol=atol)


class KilledError(Exception):
    pass


class KillAfter(keras.callbacks.Callback):
    """Ends the program in the middle of a round's callbacks, before the round is saved."""

    def __init__(self, round_number):
        super().__init__()
        self.round_number = round_number

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 == self.round_number:
            raise KilledError


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(make(), 6, tmp_path_factory.mktemp("whole"))


def test_what_was_killed_ends_with_the_weights_of_the_uninterrupted_run(uninterrupted, tmp_path):
    with pytest.raises(KilledError):
        fit(make(), 6, tmp_path, callbacks=KillAfter(4))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"round_000000{i}.ckpt" for i in (1, 2, 3)]
    newest = tmp_path / files[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"round_0000003.ckpt is damaged.*skipped"):
        weights, history = fit(make(), 6, tmp_path)
    same(weights, uninterrupted[0])
    assert history.epoch == list(range(6))
    for name in ("loss", "update_norm"):
        expected = uninterrupted[1].history[name]
        assert history.history[name] == pytest.approx(expected, rel=1e-4)
    done, history = fit(make(), 6, tmp_path)  # finished: nothing runs, everything is there
    same(done, weights, 0)
    assert len(history.history["loss"]) == 6


def test_a_program_of_two_calls_goes_on_in_the_second(uninterrupted, tmp_path):
    federated = make()
    fit(federated, 2, tmp_path)
    with pytest.raises(KilledError):
        fit(federated, 4, tmp_path, callbacks=KillAfter(5))
    again = make()
    first = fit(again, 2, tmp_path)[1]
    weights, second = fit(again, 4, tmp_path)
    same(weights, uninterrupted[0])
    assert (first.epoch, second.epoch) == ([0, 1], [2, 3, 4, 5])


def test_a_run_that_a_callback_stopped_stays_stopped(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    weights, _ = fit(make(), 5, tmp_path, callbacks=Stop())
    again, history = fit(make(), 5, tmp_path)
    same(weights, again, 0)
    assert len(history.epoch) == 2


def test_another_model_or_other_settings_are_an_error(tmp_path):
    fit(make(), 1, tmp_path)
    for arguments, name in [
        ({"seed": 1}, r"seed=0 \(now 1\)"),
        ({"batch_size": 5}, r"batch_size=20 \(now 5\)"),
        ({"server_optimizer": "yogi"}, "server_optimizer"),
        ({"units": 5}, "model"),
        ({"activation": "tanh"}, "model"),
        ({"rate": 0.2}, r"learning_rate=0.1"),
    ]:
        with pytest.raises(ValueError, match=f"must be those that the checkpoint.*{name}"):
            fit(make(**arguments), 1, tmp_path)
    with pytest.raises(ValueError, match="clients="):
        make().fit({9: CLIENTS[0], 8: CLIENTS[1], 7: CLIENTS[2]}, 1, checkpoint_dir=tmp_path)


def test_checkpoints_are_written_as_often_as_asked_and_few_are_kept(tmp_path):
    fit(make(), 5, tmp_path, checkpoint_freq=2)
    assert sorted(p.name[-6:-5] for p in tmp_path.iterdir()) == ["2", "4", "5"]


@pytest.mark.parametrize("cut", [0, 10, 40, 200])
def test_a_file_that_was_cut_off_is_passed_over(tmp_path, cut):
    checkpoints = Checkpoints(tmp_path, {"seed": 0})
    assert checkpoints.load() is None
    for number in (1, 2):
        checkpoints.save(number, [np.full(3, number)], {"more": number})
    path = tmp_path / "round_0000002.ckpt"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.warns(UserWarning, match="damaged"):
        number, (array,), about = checkpoints.load()
    assert (number, about) == (1, {"more": 1})
    np.testing.assert_array_equal(array, [1, 1, 1])


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
from test_federated_checkpoints import *
weights, history = fit(make(), 6, sys.argv[1], callbacks=keras.callbacks.LambdaCallback(
    on_epoch_end=lambda epoch, logs: print("round", epoch, flush=True)))
np.savez(sys.argv[1] + ".npz", *weights)
"""


def test_kill_9_at_any_moment(uninterrupted, tmp_path):
    """Killed once after a random time in its rounds, then run to the end."""
    folder = str(tmp_path / "state")
    command = [sys.executable, "-c", PROGRAM, folder, os.path.dirname(__file__)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("round 1"):
            break
    time.sleep(np.random.default_rng().uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    federated = make()
    weights, _ = fit(federated, 6, folder)
    same(weights, uninterrupted[0])
