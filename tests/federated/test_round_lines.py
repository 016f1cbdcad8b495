"""What a federation prints: the line of a round, and the clients that are done."""

import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.federated.clients.source import Source
from keras_lp.federated.engine import done as done_module
from keras_lp.federated.engine import installation
from keras_lp.federated.engine.done import ClientsDone
from keras_lp.federated.running import print_round
from keras_lp.utils.progress import Progress

needs_tff = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
LAST = {"clients": 1000, "dropped": 0, "update_norm": 0.12, "bytes_up": 10**9, "bytes_down": 10**9}


def logs_of(tasks, validated, metric="accuracy"):
    logs = {"seconds": 12.34, **LAST, "confusion": np.eye(3)}
    for prefix in ("", "val_") if validated else ("",):
        logs[f"{prefix}loss"] = 2.5
        for i, task in enumerate(tasks):
            logs |= {f"{prefix}{task}_loss": 1.5, f"{prefix}{task}_{metric}": 0.5 + i / 10}
    return logs


def test_the_line_of_a_model_with_one_task(capsys):
    logs = {"accuracy": 0.25, "loss": 2.5, "seconds": 1.04, **LAST, "val_loss": 2.25}
    print_round(3, 20, logs)
    print_round(3, None, {**logs, "dropped": 2})
    print_round(1, None, {"seconds": 0.1, "clients": 4})  # the first of `fit_head`
    assert capsys.readouterr().out.splitlines() == [
        "Round 3/20 - 1.0s - loss: 2.5000 - val_loss: 2.2500 - accuracy: 0.2500 - clients: 1,000",
        "Round 3 - 1.0s - dropped: 2 - loss: 2.5000 - val_loss: 2.2500 - accuracy: 0.2500 - "
        "clients: 1,000",
        "Round 1 - 0.1s - clients: 4",
    ]


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize(
    "tasks",
    [
        ["topic", "intent", "language", "sentiment"],
        ["topic_of_the_question", "topic", "sentiment_of_the_whole_review", "language_of_the_text"],
        [f"a_rather_long_name_{i}" for i in range(40)],
    ],
)
def test_the_line_of_several_tasks_has_100_columns_at_most(tasks, validated, capsys):
    print_round(1234, 2000, logs_of(tasks, validated), tasks)
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= 100
    prefix = "val_" if validated else ""
    largest = 0.5 + (len(tasks) - 1) / 10
    assert f" - {prefix}accuracy: 0.5000 to {largest:.4f} ({len(tasks)} tasks)" in line


def test_short_names_of_tasks_stand_in_the_line(capsys):
    print_round(1, 9, logs_of(["a", "a_b"], validated=True), ["a", "a_b"])
    print_round(1, 9, {**logs_of(["a", "b"], False, "mae"), "a_mae": float("nan")}, ["a", "b"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" - val_loss: 2.5000 - val_accuracy: a 0.5000, a_b 0.6000 - loss: 2.5000")
    assert " - mae: a nan, b 0.6000" in second


def test_a_metric_of_one_task_has_the_name_that_the_history_has(capsys):
    logs = {"seconds": 0.1, "val_loss": 2.0}
    print_round(1, 2, {**logs, "val_topic_accuracy": 0.5, "val_age_mae": 3.0}, ["topic", "age"])
    print_round(1, 2, {**logs, "val_topic_loss": 1.0, "val_age_hinge_loss": 4.0}, ["topic", "age"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("val_loss: 2.0000 - val_topic_accuracy: 0.5000 - val_age_mae: 3.0000")
    assert second.endswith("val_loss: 2.0000 - val_age_hinge_loss: 4.0000")


def test_clients_done_are_written_a_few_times_a_second(tmp_path):
    done = ClientsDone(tmp_path)
    write = tf.function(lambda last: done.write(tf.constant(1), tf.constant(7), last))
    now = tf.timestamp()
    assert write(now + 60) == now + 60  # not yet due
    assert done.read() == 0
    assert write(now - 60) >= now
    (tmp_path / "0.done").write_text("5")
    (tmp_path / "2.done").write_text("")  # while it is being written
    assert done.read() == 12
    done.clear()
    assert done.read() == 0


@needs_tff
def test_progress_of_clients_in_the_worker(mlp, digits, monkeypatch, capsys):
    monkeypatch.setattr(done_module, "_SECONDS", -1.0)  # each client
    model = lp.transfer_model(mlp(), 10, optimizer="sgd")
    federated = lp.FederatedAveraging(model)
    clients = lp.partition(digits, clients=6)
    history = federated.fit(clients, 1, verbose=0).history
    assert history["clients"] == [6]
    assert federated._rounds._done.read() == 6
    plain = federated.evaluate(clients)
    assert capsys.readouterr().out == ""
    assert federated.evaluate(clients, verbose=1) == plain
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" - ")[0] for line in lines] == [
        *(f"Evaluation {i}/12" for i in range(1, 7)),  # the features of each
        "Evaluation 12/12",
    ]


def test_clients_wait_for_features_once(mlp, digits):
    model = lp.transfer_model(mlp(), 10)
    with Source(model, lp.partition(digits, clients=4)) as source:
        first, second = source.ids[:2], source.ids
        assert [source.waiting(first), source.waiting(second)] == [2, 4]
        with Progress("Clients", 4, 0) as progress:
            source.load_all(first, progress)
            assert progress.done == 2
            assert source.waiting(second) == 2
            source.load_all(second, progress)
            assert progress.done == 4
    everything = lp.finetune_model(model, trainable="all")
    with Source(everything, lp.partition(digits, clients=4)) as source:
        assert source.waiting(source.ids) == 0
    with Source(everything, (["a"], lambda _: digits)) as source:  # loaded each time
        source.load_all(["a"])
        assert source.waiting(["a"]) == 1
