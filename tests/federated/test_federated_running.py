"""Running a federation: callbacks, validation, evaluation over clients, a worker that dies."""

import csv
import threading
import time

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation, rounds
from keras_lp.federated.engine import worker as worker_module
from keras_lp.federated.engine.blocks import to_blocks

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def classifier(rate=0.5, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss, metrics=["accuracy"])
    return model


@pytest.fixture(scope="module")
def federated(digits):
    """One federation, built once, for tests that only look at how it runs."""
    model = classifier()
    made = lp.FederatedAveraging(model, clients_per_round=4)
    made.fit(lp.partition(digits, clients=8, alpha=0.5), 1, verbose=0)
    return made


@pytest.fixture(scope="module")
def clients(digits):
    return lp.partition(digits, clients=8, alpha=0.5)


def test_keras_callbacks_run_once_a_round(federated, clients, digits, tmp_path):
    first = federated.rounds_done
    callbacks = [
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "val_loss", save_best_only=True),
        keras.callbacks.TensorBoard(tmp_path / "board"),
    ]
    history = federated.fit(
        clients, 3, validation_data=digits, callbacks=callbacks, verbose=0
    ).history
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [first, first + 1, first + 2]
    assert [float(row["val_loss"]) for row in rows] == pytest.approx(history["val_loss"])
    saved = keras.models.load_model(tmp_path / "best.keras")
    best = saved.evaluate(*digits, verbose=0)[0]
    assert best == pytest.approx(min(history["val_loss"]), rel=1e-5)
    assert list((tmp_path / "board").rglob("events*"))


def test_early_stopping_ends_the_rounds_and_restores_the_best(federated, clients, digits):
    stopping = keras.callbacks.EarlyStopping(
        "val_loss", patience=1, mode="max", restore_best_weights=True
    )
    history = federated.fit(
        clients, 9, validation_data=digits, callbacks=stopping, verbose=0
    ).history
    assert len(history["val_loss"]) < 9
    now = federated.model.evaluate(*digits, verbose=0)[0]
    assert now == pytest.approx(max(history["val_loss"]), rel=1e-5)


def test_validation_runs_as_often_as_asked(federated, clients, digits, capsys):
    first = federated.rounds_done
    arguments = {"validation_data": digits, "verbose": 0}
    assert len(federated.fit(clients, 2, validation_freq=2, **arguments).history["val_loss"]) == 1
    listed = federated.fit(clients, 3, validation_freq=[first + 3, first + 5], **arguments).history
    assert len(listed["val_loss"]) == 2
    assert len(listed["loss"]) == 3
    with pytest.raises(ValueError, match="validation_freq=0"):
        federated.fit(clients, 1, validation_freq=0, **arguments)
    assert capsys.readouterr().out == ""


def test_evaluate_gives_the_mean_the_worst_tenth_and_the_whole(federated, digits):
    x, y = digits
    parts = lp.partition(digits, clients=20, alpha=0.3, seed=4)
    each = [federated.model.evaluate(*part, verbose=0, return_dict=True) for part in parts.values()]
    whole = federated.model.evaluate(x, y, verbose=0, return_dict=True)
    expected = {"clients": 20, **whole}
    for name, better in {"loss": -1, "accuracy": 1}.items():
        values = sorted((one[name] for one in each), key=lambda value, b=better: b * value)
        expected[f"mean_{name}"] = np.mean(values)
        expected[f"worst_decile_{name}"] = np.mean(values[:2])
    found = federated.evaluate(parts)
    assert found == pytest.approx(expected, abs=1e-5)
    assert found["worst_decile_accuracy"] < found["mean_accuracy"]


def test_federations_side_by_side_are_as_each_alone(clients):
    alone, crowded, other = (classifier(seed=s) for s in (0, 0, 5))
    lp.FederatedAveraging(alone, clients_per_round=3).fit(clients, 2, verbose=0)
    first = lp.FederatedAveraging(crowded, clients_per_round=3)
    second = lp.FederatedAveraging(other, server_optimizer="adam")
    for _ in range(2):
        first.fit(clients, 1, verbose=0)
        second.fit(clients, 1, verbose=0)
    for a, b in zip(alone.get_weights(), crowded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_worker_that_dies_in_a_round_is_restarted_and_the_round_repeated(
    clients, digits, monkeypatch
):
    x, y = digits
    heavy = {name: (np.repeat(x, 20, 0), np.repeat(y, 20, 0)) for name in range(4)}
    models = [classifier(rate=0.01), classifier(rate=0.01)]
    worker = worker_module.load_worker()
    restarts = worker.restarts
    for model, killed in zip(models, (False, True), strict=True):
        federated = lp.FederatedAveraging(model, local_epochs=8)
        federated.fit(clients, 1, verbose=0)
        start = time.perf_counter()
        if not killed:
            federated.fit(heavy, 1, verbose=0)
            seconds = time.perf_counter() - start
            continue
        timer = threading.Timer(seconds * 0.2, worker.process.kill)

        # The last step before the worker trains.
        def write_blocks(*arguments, start=timer.start, **kwargs):
            start()
            return to_blocks(*arguments, **kwargs)

        monkeypatch.setattr(rounds, "to_blocks", write_blocks)
        federated.fit(heavy, 1, verbose=0)
        timer.join()
    assert worker.restarts == restarts + 1
    for a, b in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_worker_that_dies_again_and_again_is_an_error(federated, clients, monkeypatch):
    worker = worker_module.load_worker()
    stub = worker.stub

    def dying():
        made = stub()
        worker.process.kill()
        worker.process.wait()
        return made

    monkeypatch.setattr(worker, "stub", dying)
    worker.end()
    with pytest.raises(RuntimeError, match="4 deaths in one"):
        federated.fit(clients, 1, verbose=0)
    monkeypatch.undo()
    federated.fit(clients, 1, verbose=0)
