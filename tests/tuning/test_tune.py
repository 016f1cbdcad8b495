"""`lp.tune`: the result, resuming, several processes, bounded files and wrong input."""

import itertools
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.tuning.search import check_bracket
from tests.conftest import assert_same, snapshot

FIXED = {"hidden_units": (), "dropout": 0.0, "schedule": "constant"}


@pytest.fixture
def data(digits):
    return digits


@pytest.fixture
def hypermodel(mlp):
    return lp.TransferHyperModel(mlp(), 10, **FIXED)


def score(found, data):
    return found.model.evaluate(*data, verbose=0, return_dict=True)


def test_the_best_model_has_the_best_score(hypermodel, data):
    x, y = data
    held_out = x[150:], y[150:]
    found = lp.tune(
        hypermodel, (x[:150], y[:150]), validation_data=held_out, max_trials=4, tuner="random",
        epochs=3, verbose=0,
    )  # fmt: skip
    assert len(found.trials) == 4
    scores = [trial.score for trial in found.trials]
    assert found.best.score == max(scores)
    assert found.objective == "val_accuracy"
    assert score(found, held_out)["accuracy"] == pytest.approx(found.best.score)
    assert found.hyperparameters == found.best.hyperparameters
    rate = float(found.model.optimizer.learning_rate)
    assert rate == pytest.approx(found.hyperparameters["learning_rate"])


@pytest.mark.parametrize("tuner", ["random", "bayesian"])
def test_the_first_trial_has_the_default_values(tuner, mlp, data):
    hypermodel = lp.TransferHyperModel(mlp(), 10)
    found = lp.tune(hypermodel, data, max_trials=2, tuner=tuner, epochs=1, verbose=0)
    first, second = (trial.hyperparameters for trial in found.trials)
    assert first == {
        "learning_rate": 1e-3, "schedule": "constant", "hidden_units": 0, "dropout": 0.0
    }  # fmt: skip
    assert first != second


def test_hyperband_goes_on_with_the_best_without_training_again(hypermodel, data):
    epochs = []

    class Look(keras.callbacks.Callback):
        def __deepcopy__(self, memo):
            return self

        def on_epoch_begin(self, epoch, logs=None):
            epochs.append(epoch)

    found = lp.tune(hypermodel, data, max_trials=4, epochs=3, callbacks=[Look()], verbose=0)
    assert epochs == [0, 0, 0, 1, 2]  # three trials of an epoch; the best goes on
    first = found.trials[0]
    assert first.hyperparameters == {"learning_rate": 1e-3}
    best = max(found.trials[:3], key=lambda trial: trial.score)
    assert found.trials[3].hyperparameters == best.hyperparameters
    assert [trial.epochs for trial in found.trials[:3]] == [1, 1, 1]
    assert found.trials[3].epochs in (2, 3)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 9, 10, 27, 30])
def test_the_first_bracket_is_that_of_keras_tuner(epochs, tmp_path):
    oracle = keras_tuner.oracles.HyperbandOracle("val_loss", max_epochs=epochs)
    oracle._set_project_dir(str(tmp_path), "p")
    hp = keras_tuner.HyperParameters()
    hp.Float("rate", 0, 1)
    oracle.update_space(hp)
    start, count = oracle.get_state()["current_bracket"], 0
    for count in itertools.count():
        trial = oracle.create_trial("t")
        if oracle.get_state()["current_bracket"] != start or trial.status == "STOPPED":
            break
        oracle.update_trial(trial.trial_id, {"val_loss": float(count)})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
        if epochs < 3 and count + 1 == oracle._get_size(0, 0):
            count += 1
            break
    check_bracket(count, epochs)
    with pytest.raises(ValueError, match=f"needs max_trials={count} or more"):
        check_bracket(count - 1, epochs)


@pytest.mark.parametrize(("tuner", "trials"), [("random", 2), ("hyperband", 4)])
def test_the_same_seed_gives_the_same_search(tuner, trials, mlp, data):
    made = []
    for seed in (3, 3, 4):
        hypermodel = lp.TransferHyperModel(mlp(), 10, **{**FIXED, "dropout": 0.3})
        keras.utils.set_random_seed(len(made))  # what the program drew before does not matter
        hypermodel.backbone.set_weights(
            [np.random.default_rng(0).normal(size=w.shape) for w in hypermodel.backbone.weights]
        )
        found = lp.tune(
            hypermodel, data, max_trials=trials, tuner=tuner, epochs=3, seed=seed, verbose=0
        )
        made.append((found.trials, snapshot(found.model)))
    assert made[0][0] == made[1][0]
    assert_same(made[0][1], made[1][1])
    assert made[0][0] != made[2][0]


class Killed(BaseException):
    """Ends a search as a kill does: not an exception that the tuner catches."""


@pytest.mark.parametrize("tuner", ["random", "hyperband", "bayesian", "fine-tuning"])
def test_a_killed_search_ends_as_if_it_had_not_been_killed(tuner, mlp, data, tmp_path):
    class Kill(keras.callbacks.Callback):
        left = 10**6

        def __deepcopy__(self, memo):
            return self

        def on_epoch_end(self, epoch, logs=None):
            Kill.left -= 1
            if Kill.left == 0:
                raise Killed

    def search(folder):
        hypermodel = lp.TransferHyperModel(network, 10, **{**FIXED, "dropout": 0.3})
        if tuner == "fine-tuning":
            hypermodel = lp.FinetuneHyperModel(network, 10, hidden_units=(8,), dropout=0.3)
        kind = "random" if tuner == "fine-tuning" else tuner
        return lp.tune(
            hypermodel, data, max_trials=4, tuner=kind, epochs=3, directory=tmp_path / folder,
            callbacks=[Kill()], verbose=0,
        )  # fmt: skip

    network = mlp()
    whole = search("whole")
    Kill.left = 3
    with pytest.raises(Killed):
        search("killed")
    Kill.left = 10**6
    again = search("killed")
    assert again.trials == whole.trials
    assert_same(snapshot(again.model), snapshot(whole.model))
    Kill.left = 1
    assert search("killed").trials == whole.trials  # nothing is left to do
    assert Kill.left == 1


def test_more_trials_continue_a_search(hypermodel, data, tmp_path):
    def search(trials):
        return lp.tune(
            hypermodel, data, max_trials=trials, tuner="random", epochs=1, directory=tmp_path,
            verbose=0,
        ).trials  # fmt: skip

    first = search(2)
    assert search(4)[:2] == first


def test_only_the_weights_that_are_needed_stay_on_disk(hypermodel, data, tmp_path):
    lp.tune(hypermodel, data, max_trials=2, tuner="random", epochs=1, directory=tmp_path, verbose=0)
    assert len(list(tmp_path.rglob("*.weights.h5"))) == 1
    folder = tmp_path / "hyperband"
    found = lp.tune(hypermodel, data, max_trials=5, epochs=3, directory=folder, verbose=0)
    kept = {path.parent.name for path in folder.rglob("*.weights.h5")}
    # The fifth trial began the second bracket, which more trials would continue.
    assert kept == {"trial_4", f"trial_{found.best.name}"}


def test_a_search_without_a_directory_leaves_nothing(hypermodel, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lp.tune(hypermodel, data, max_trials=1, tuner="random", epochs=1, verbose=0)
    assert not [path for path in tmp_path.iterdir() if "autograph" not in path.name]


def test_held_out_examples_have_every_class_and_never_train(hypermodel, data, monkeypatch):
    seen = {}
    fit = type(hypermodel).fit

    def look(self, hp, model, *args, **kwargs):
        seen.update(kwargs)
        return fit(self, hp, model, *args, **kwargs)

    monkeypatch.setattr(type(hypermodel), "fit", look)
    x, y = data
    weight = np.arange(200.0)
    lp.tune(hypermodel, (x, y, weight), max_trials=1, tuner="random", epochs=1, verbose=0)
    held_out = seen["validation_data"]
    assert len(held_out[0]) == 40
    shares = np.bincount(held_out[1], minlength=10) - np.bincount(y, minlength=10) / 5
    assert np.abs(shares).max() < 1
    together = np.concatenate([seen["sample_weight"], held_out[2]])
    np.testing.assert_array_equal(np.sort(together), weight)
    rows = held_out[2].astype(int)
    np.testing.assert_array_equal(held_out[0], x[rows])


def test_data_sets_and_sample_weights(hypermodel, data):
    x, y = data
    batches = tf.data.Dataset.from_tensor_slices((x, y, np.ones(200, "float32"))).batch(50)
    found = lp.tune(
        hypermodel, batches.take(3), validation_data=batches.skip(3), max_trials=1,
        tuner="random", epochs=2, verbose=0,
    )  # fmt: skip
    assert score(found, (x[150:], y[150:]))["accuracy"] == pytest.approx(found.best.score)
    assert found.refit(batches).count_params() == found.model.count_params()


def test_refit_trains_for_the_best_number_of_epochs_on_all_data(hypermodel, data, monkeypatch):
    found = lp.tune(hypermodel, data, max_trials=2, tuner="random", epochs=3, verbose=0)
    model = found.refit(data)
    assert model is not found.model
    assert model.history.epoch == list(range(found.best.epochs))
    again = found.refit(data)
    assert_same(snapshot(model), snapshot(again))
    sizes = []
    fit = type(hypermodel).fit
    monkeypatch.setattr(
        type(hypermodel), "fit",
        lambda self, *args, **kwargs: sizes.append(len(kwargs["x"])) or fit(self, *args, **kwargs),
    )  # fmt: skip
    found.refit(data)
    assert sizes == [200]
    assert not hypermodel._features


@pytest.mark.parametrize(
    ("objective", "name", "direction"),
    [
        (None, "val_gain", "max"),
        ("even", "val_even_accuracy", "max"),
        ("size", "val_size_mae", "min"),
        ("val_loss", "val_loss", "min"),
        (keras_tuner.Objective("val_even_loss", "min"), "val_even_loss", "min"),
    ],
)
def test_objectives(objective, name, direction, mlp, data):
    x, y = data
    labels = {"even": y % 2, "size": y.astype("float32")}
    hypermodel = lp.MultitaskHyperModel(
        mlp(), {"even": 2, "size": lp.Regression()}, balancing="equal", **{**FIXED}
    )
    found = lp.tune(
        hypermodel, (x, labels), max_trials=1, tuner="random", epochs=1, objective=objective,
        verbose=0,
    )  # fmt: skip
    assert (found.objective, found.direction) == (name, direction)
    assert found.best.score is not None


def test_a_hypermodel_of_the_users_own(mlp, data):
    class Own(keras_tuner.HyperModel):
        def build(self, hp):
            model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.Adam(hp.Choice("rate", [0.1, 0.01])), loss=loss)
            return model

    found = lp.tune(Own(), data, max_trials=2, tuner="grid", epochs=1, verbose=0)
    assert found.objective == "val_loss"
    assert {trial.hyperparameters["rate"] for trial in found.trials} == {0.1, 0.01}


def test_the_table_and_the_lines(hypermodel, data, capsys, tmp_path):
    found = lp.tune(hypermodel, data, max_trials=3, tuner="random", epochs=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(
        r"Trial 1/3 - \d+s - val_accuracy: 0\.\d{4} - best: 0\.\d{4} - about \d+(s|min) left",
        lines[0],
    )
    assert re.fullmatch(r"Trial 3/3 - \d+s - val_accuracy: 0\.\d{4} - best: 0\.\d{4}", lines[2])
    rows = [line.split() for line in str(found).splitlines()]
    assert rows[0] == ["trial", "val_accuracy", "epochs", "learning_rate"]
    shown = [float(row[1]) for row in rows[1:]]
    assert shown == sorted(shown, reverse=True)
    assert rows[1][0] == found.best.name
    assert repr(found) == str(found)
    figure = found.plot(tmp_path / "tuning.png")
    titles = [(ax.get_xlabel(), ax.get_xscale()) for ax in figure.axes if ax.axison]
    assert titles == [("trial", "linear"), ("learning_rate", "log")]
    drawn = figure.axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(drawn, [trial.score for trial in found.trials])
    assert (tmp_path / "tuning.png").read_bytes()[1:4] == b"PNG"


def test_a_trial_that_fails_later_is_in_the_table(hypermodel, data, capsys):
    class Fail(keras.callbacks.Callback):
        trials = 0

        def __deepcopy__(self, memo):
            return self

        def on_train_begin(self, logs=None):
            Fail.trials += 1
            if Fail.trials == 2:
                raise ValueError("too large")

    found = lp.tune(hypermodel, data, max_trials=3, tuner="random", epochs=1, callbacks=[Fail()])
    assert [trial.score is None for trial in found.trials] == [False, True, False]
    assert "too large" in found.trials[1].error
    assert str(found).splitlines()[-1].split()[1] == "failed"
    assert "failed: ValueError: too large" in capsys.readouterr().out


def test_wrong_input_is_refused_before_the_first_trial(mlp, hypermodel, data, tmp_path):
    x, y = data

    def tune(hypermodel=hypermodel, data=data, max_trials=1, tuner="random", **kwargs):
        kwargs = {"epochs": 1, "verbose": 0, **kwargs}
        return lp.tune(hypermodel, data, max_trials=max_trials, tuner=tuner, **kwargs)

    with pytest.raises(ValueError, match="space with one point"):
        tune(lp.TransferHyperModel(mlp(), 10, learning_rate=0.1, **FIXED))
    one = lp.TransferHyperModel(mlp(), 10, **FIXED, learning_rate=lambda hp: hp.Choice("r", [0.1]))
    with pytest.raises(ValueError, match="two or more values"):
        tune(one)
    with pytest.raises(ValueError, match=r"`objective` must be one of .*Did you mean 'val_acc"):
        tune(objective="val_acuracy")
    with pytest.raises(ValueError, match="needs max_trials=4 or more"):
        tune(tuner="hyperband", epochs=3, max_trials=3)
    with pytest.raises(ValueError, match="`tuner` must be one of"):
        tune(tuner="hyperbnd")
    with pytest.raises(ValueError, match="Labels must be class numbers from 0 to 9") as caught:
        tune(data=(x, y + 5))
    assert type(caught.value) is ValueError
    with pytest.raises(ValueError, match="needs `validation_data`"):
        tune(data=tf.data.Dataset.from_tensor_slices((x, y)).batch(10))
    with pytest.raises(ValueError, match="needs `validation_data`"):
        tune(lp.FederatedHyperModel(mlp(), 10), data=lp.partition(data, clients=2))
    with pytest.raises(ValueError, match=r"10 or more\. Received: 5 examples"):
        tune(data=(x[:5], y[:5]))
    with pytest.raises(TypeError, match="`data` must be"):
        tune(data=x)
    tune(directory=tmp_path)
    with pytest.raises(ValueError, match=r"same settings. Received: \{'seed': 1\}"):
        tune(directory=tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"same settings. Received: \{'tasks': "):
        tune(lp.TransferHyperModel(mlp(), 11, **FIXED), directory=tmp_path)


def test_single_task_models_are_trained_once_for_a_search(mlp, data, tmp_path, monkeypatch):
    x, y = data
    labels = {"even": y % 2, "high": (y > 4).astype(int)}
    made = []
    compare = lp.MultitaskHyperModel.compare
    monkeypatch.setattr(
        lp.MultitaskHyperModel, "compare", lambda *a, **k: made.append(1) or compare(*a, **k)
    )
    found = []
    for _ in range(2):
        hypermodel = lp.MultitaskHyperModel(mlp(), dict.fromkeys(labels, 2), balancing="equal")
        found.append(lp.tune(
            hypermodel, (x, labels), max_trials=1, tuner="random", epochs=1, directory=tmp_path,
            verbose=0,
        ))  # fmt: skip
        assert set(hypermodel.comparison.single) == set(labels)
    assert len(made) == 1
    assert found[0].trials == found[1].trials


@pytest.mark.slow
def test_two_workers_and_a_chief_share_a_search(tmp_path):
    program = tmp_path / "search.py"
    program.write_text(
        textwrap.dedent("""
        import sys
        import keras
        import keras_lp as lp

        x, y = lp.load_dataset("digits", split="train", batch_size=-1)
        x, y = x[:200].reshape(200, 64).astype("float32"), y[:200]
        network = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8, "relu")])
        hypermodel = lp.TransferHyperModel(
            network, 10, hidden_units=(), dropout=0.0, schedule="constant"
        )
        found = lp.tune(
            hypermodel, (x, y), max_trials=6, tuner="random", epochs=2, directory=sys.argv[1]
        )
        print(len(found.trials), "trials")
    """)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(name):
        env = {
            **os.environ,
            "KERASTUNER_TUNER_ID": name,
            "KERASTUNER_ORACLE_IP": "127.0.0.1",
            "KERASTUNER_ORACLE_PORT": str(port),
            "PYTHONPATH": str(Path(lp.__file__).parents[1]),
        }
        command = [sys.executable, str(program), str(tmp_path / "search")]
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    started = [start(name) for name in ("chief", "worker0", "worker1")]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    chief, *workers = outputs
    assert "6 trials" in chief
    lines = [re.findall(r"^Trial (\d)/6", output, re.M) for output in workers]
    assert sorted(itertools.chain(*lines)) == list("123456")


def test_a_beaten_trial_writes_no_weights(hypermodel, data, monkeypatch):
    saved = []
    save = keras.Model.save_weights
    monkeypatch.setattr(
        keras.Model,
        "save_weights",
        lambda model, path: saved.append(str(path)) or save(model, path),
    )
    found = lp.tune(hypermodel, data, max_trials=4, tuner="random", epochs=1, verbose=0)
    best, expected = -1.0, []
    for trial in found.trials:
        if trial.score > best:
            best = trial.score
            expected.append(trial.name)
    assert [path.split("trial_")[1].split("/")[0] for path in saved] == expected
    assert len(expected) < 4
