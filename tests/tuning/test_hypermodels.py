"""The hypermodels: spaces, isolation of trials, shared features, under keras-tuner's own tuners."""

import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner import HyperParameters

import keras_lp as lp
from keras_lp.backbones.blocks import blocks_of
from keras_lp.backbones.freezing import is_frozen
from keras_lp.model.caching import FeatureCache
from keras_lp.tasks.heads import backbone_of, heads
from keras_lp.tuning import space
from keras_lp.tuning.callbacks import cheaper
from tests.conftest import Batches, assert_same, snapshot
from tests.model.test_shared_features import Counting

TASKS = {"digit": 10, "even": 2}


def build(hypermodel, **values):
    hp = HyperParameters()
    hp.values = values
    return hypermodel.build(hp), hp


def searched(hypermodel):
    hp = HyperParameters()
    hypermodel.build(hp)
    return {one.name: one for one in hp.space}


def test_default_spaces(mlp, tmp_path):
    assert list(searched(lp.TransferHyperModel(mlp(), 3))) == [
        *("learning_rate", "schedule", "hidden_units", "dropout")
    ]
    assert list(searched(lp.FinetuneHyperModel(mlp(), 3))) == [
        *("learning_rate", "schedule", "dropout", "layer_decay", "trainable")
    ]
    found = searched(lp.MultitaskHyperModel(mlp(), TASKS))
    assert list(found) == ["learning_rate", "schedule", "balancing", "dropout"]
    made = keras_tuner.RandomSearch(
        lp.MultitaskHyperModel(mlp(), TASKS), objective="val_loss", directory=tmp_path
    )
    assert "weight_even" in {one.name for one in made.oracle.get_space().space}
    assert list(searched(lp.FederatedHyperModel(mlp(), 3))) == [
        *("learning_rate", "local_epochs", "server_optimizer", "proximal_strength")
    ]
    rate = found["learning_rate"]
    assert (rate.min_value, rate.max_value, rate.sampling) == (1e-4, 3e-2, "log")


def test_values_reach_the_model(mlp):
    model, _ = build(
        lp.TransferHyperModel(mlp(), 3, pooling="avg"),
        learning_rate=0.02, hidden_units=64, dropout=0.3, schedule="cosine",
    )  # fmt: skip
    assert float(model.optimizer.learning_rate) == pytest.approx(0.02)
    assert model.get_layer("predictions_hidden_0").units == 64
    assert model.get_layer("predictions_dropout").rate == pytest.approx(0.3)
    assert is_frozen(backbone_of(model))

    hypermodel = lp.FinetuneHyperModel(mlp((8, 8, 8, 8)), 3, lora="search")
    model, _ = build(hypermodel, learning_rate=1e-3, layer_decay=0.5, trainable="half")
    assert sorted({*model.optimizer.multipliers}) == [
        0.25,
        0.5,
        1.0,
    ]  # the head and two of four blocks
    model, hp = build(hypermodel, lora_rank=4)
    assert [v.name for v in model.trainable_variables][:2] == ["lora_kernel_a", "lora_kernel_b"]
    assert "layer_decay" not in {one.name for one in hp.space}

    model, _ = build(lp.MultitaskHyperModel(mlp(), TASKS), balancing="weights", weight_even=2.0)
    assert {name: head.task.weight for name, head in heads(model).items()} == {
        "digit": 1.0, "even": 2.0
    }  # fmt: skip
    model, _ = build(lp.MultitaskHyperModel(mlp(), TASKS), balancing="uncertainty")
    assert any(isinstance(layer, lp.Balancing) for layer in model.layers)


def test_an_argument_is_a_value_or_a_function(mlp):
    class Own(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.5

    hypermodel = lp.TransferHyperModel(
        mlp(), 3, learning_rate=Own(), dropout=lambda hp: hp.Choice("drop", [0.4, 0.5]),
        schedule="constant", augmentation=keras.layers.GaussianNoise(0.1),
    )  # fmt: skip
    assert sorted(searched(hypermodel)) == ["drop", "hidden_units"]
    model, _ = build(hypermodel, drop=0.5)
    assert float(model.optimizer.learning_rate) == 0.5
    assert model.get_layer("predictions_dropout").rate == 0.5


@pytest.mark.parametrize(("share", "blocks"), [("quarter", 1), ("half", 2), ("all", 4)])
def test_shares_are_of_the_blocks(mlp, share, blocks):
    network = mlp((8, 8, 8, 8))
    assert len(blocks_of([network])) == 4
    model, _ = build(lp.TransferHyperModel(network, 3, trainable="search"), trainable=share)
    trained = [layer for layer in backbone_of(model).layers if layer.trainable_variables]
    assert len(trained) == blocks


def test_wrong_arguments(mlp):
    with pytest.raises(TypeError, match=r"dropuot=0.1. Did you mean 'dropout'"):
        lp.TransferHyperModel(mlp(), 3, dropuot=0.1)
    with pytest.raises(TypeError, match="balancing"):
        lp.TransferHyperModel(mlp(), 3, balancing="equal")
    with pytest.raises(ValueError, match="`schedule` must be one of"):
        build(lp.TransferHyperModel(mlp(), 3, schedule="linear"))
    with pytest.raises(ValueError, match=r"pretrained backbone. Received: .*'pretrained': False"):
        lp.FinetuneHyperModel(mlp(), 3, pretrained=False)
    decay = keras.optimizers.schedules.CosineDecay(0.1, 10)
    with pytest.raises(ValueError, match='Pass schedule="constant"'):
        build(lp.TransferHyperModel(mlp(), 3, learning_rate=decay, schedule="cosine"))


def test_a_backbone_that_cannot_be_copied(digits):
    class Own(keras.layers.Layer):
        def __init__(self, value):
            super().__init__()

        def call(self, x):
            return x * 2

    network = keras.Sequential([keras.Input((64,)), Own(1), keras.layers.Dense(8)])
    with pytest.raises(ValueError, match=r"pass the \.keras file"):
        lp.FinetuneHyperModel(network, 10)
    model, _ = build(lp.TransferHyperModel(network, 10))  # frozen: shared
    assert model.count_params() == 64 * 8 + 8 + 2 * 8 + 8 * 10 + 10


@pytest.mark.parametrize("kind", ["transfer", "finetune", "multitask", "federated"])
def test_a_trial_leaks_into_no_other_and_not_into_the_users_object(kind, mlp, digits):
    network, (x, y) = mlp(), digits
    before = snapshot(network)
    make = {
        "transfer": lambda: lp.TransferHyperModel(network, 10, trainable="all"),
        "finetune": lambda: lp.FinetuneHyperModel(network, 10),
        "multitask": lambda: lp.MultitaskHyperModel(network, TASKS),
        "federated": lambda: lp.FederatedHyperModel(network, 10, trainable="all"),
    }[kind]
    hypermodel = make()
    first, hp = build(hypermodel)
    start = snapshot(backbone_of(first))
    if kind == "federated":
        hypermodel.fit(hp, first, lp.partition((x, y), clients=2), verbose=0)
    else:
        labels = {"digit": y, "even": y % 2} if kind == "multitask" else y
        hypermodel.fit(hp, first, x, labels, epochs=2, verbose=0)
    assert any((a != b).any() for a, b in zip(start, snapshot(backbone_of(first)), strict=True))
    second, _ = build(hypermodel)
    assert_same(start, snapshot(backbone_of(second)))
    assert_same(before, snapshot(network))
    for weight in network.weights:  # the user's object changes: later trials do not
        weight.assign(weight * 0)
    assert_same(start, snapshot(backbone_of(build(hypermodel)[0])))


def test_all_trials_share_the_features(digits):
    Counting.seen = 0
    layers = [Counting(), keras.layers.Dense(16, "relu")]
    network = keras.Sequential([keras.Input((64,)), *layers])
    hypermodel = lp.TransferHyperModel(network, 10)
    x, y = digits
    for units in (0, 64):
        model, hp = build(hypermodel, hidden_units=units)
        hypermodel.fit(hp, model, x, y, epochs=2, verbose=0)
    assert Counting.seen == 200
    Counting.seen = 0
    hypermodel = lp.FinetuneHyperModel(network, 10)
    for _ in range(2):
        model, hp = build(hypermodel)
        hypermodel.fit(hp, model, x, y, epochs=1, verbose=0)
    assert Counting.seen == 200 + 2 * 200  # the features, and an epoch of each trial


def test_the_head_is_solved_before_all_layers_train(mlp, digits):
    x, y = digits
    hypermodel = lp.FinetuneHyperModel(mlp(), 10, learning_rate=1e-12, weight_decay=None)
    model, hp = build(hypermodel)
    hypermodel.fit(hp, model, x, y, verbose=0)
    solved = hypermodel.from_backbone({"trainable": "head"})
    lp.fit_head(solved, (x, y), verbose=0)
    np.testing.assert_allclose(model.predict(x, verbose=0), solved.predict(x, verbose=0), atol=1e-4)
    again, hp = build(hypermodel)
    start = snapshot(again)
    hypermodel.fit(hp, again, x, y, initial_epoch=3, epochs=4, verbose=0)
    np.testing.assert_allclose(snapshot(again)[-2], start[-2], atol=1e-6)  # no first phase


def test_hidden_heads_are_trained_first(mlp, digits):
    x, y = (np.repeat(part, 10, 0) for part in digits)
    hypermodel = lp.FinetuneHyperModel(mlp(), 10, learning_rate=1e-12, hidden_units=(32,))
    model, hp = build(hypermodel)
    hypermodel.fit(hp, model, x, y, verbose=0)
    assert model.evaluate(x, y, verbose=0)[0] < 2  # ln(10) is 2.3


def test_copied_heads_predict_the_same_for_regression(mlp, digits):
    x, y = digits
    hypermodel = lp.FinetuneHyperModel(
        mlp(), lp.Regression(), learning_rate=1e-12, weight_decay=None
    )
    model, hp = build(hypermodel)
    hypermodel.fit(hp, model, x, y * 100.0, verbose=0)
    assert model.evaluate(x, y * 100.0, verbose=0, return_dict=True)["mae"] < 200


def test_the_cosine_schedule_goes_on_where_a_trial_continues(mlp, digits, tmp_path):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(float(self.model.optimizer.learning_rate))

    def fit(model, hp, **epochs):
        hypermodel.fit(hp, model, *digits, verbose=0, callbacks=[Look()], **epochs)

    hypermodel = lp.TransferHyperModel(mlp(), 10, learning_rate=0.1, schedule="cosine")
    model, hp = build(hypermodel)
    fit(model, hp, epochs=4)
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(4) / 4))
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    model.save_weights(tmp_path / "m.weights.h5")
    seen.clear()
    model, hp = build(hypermodel)
    model.load_weights(tmp_path / "m.weights.h5")  # with the decayed rate
    fit(model, hp, initial_epoch=4, epochs=8)
    np.testing.assert_allclose(seen, 0.05 * (1 + np.cos(np.pi * np.arange(4, 8) / 8)), rtol=1e-5)


def test_backbones_are_loaded_once_and_few_are_kept(mlp, tmp_path, monkeypatch):
    mlp().save(tmp_path / "m.keras")
    loads = []
    load = keras.models.load_model
    monkeypatch.setattr(keras.models, "load_model", lambda path: loads.append(path) or load(path))
    hypermodel = lp.TransferHyperModel(
        str(tmp_path / "m.keras"), 3,
        cache_memory=lambda hp: hp.Int("memory", 1000, 9000, step=1000),
    )  # fmt: skip
    for memory in (1000, 1000, 2000, 3000, 4000, 5000):
        build(hypermodel, memory=memory)
    assert len(loads) == 5
    assert len(hypermodel._bases) == 4


@pytest.mark.parametrize(
    "tuner",
    [
        lambda hypermodel, **kw: keras_tuner.RandomSearch(hypermodel, max_trials=2, **kw),
        lambda hypermodel, **kw: keras_tuner.BayesianOptimization(hypermodel, max_trials=2, **kw),
        lambda hypermodel, **kw: keras_tuner.GridSearch(hypermodel, max_trials=2, **kw),
        lambda hypermodel, **kw: keras_tuner.Hyperband(hypermodel, max_epochs=3, **kw),
    ],
    ids=["random", "bayesian", "grid", "hyperband"],
)
def test_they_run_under_every_tuner_of_keras_tuner(tuner, mlp, digits, tmp_path):
    x, y = digits
    made = tuner(
        lp.TransferHyperModel(mlp(), 10, hidden_units=()),
        objective="val_accuracy", seed=1, directory=tmp_path, overwrite=True,
    )  # fmt: skip
    stop = keras.callbacks.EarlyStopping(patience=1)
    made.search(
        x[:150], y[:150], validation_data=(x[150:], y[150:]), epochs=1, verbose=0,
        callbacks=[stop],
    )  # fmt: skip
    (best,) = made.oracle.get_best_trials(1)
    (model,) = made.get_best_models(1)
    found = model.evaluate(x[150:], y[150:], verbose=0, return_dict=True)
    assert found["accuracy"] == pytest.approx(best.score)


def test_executions_start_again(mlp, digits, tmp_path):
    x, y = digits
    starts = []

    class Look(keras.callbacks.Callback):
        def __deepcopy__(self, memo):
            return self

        def on_train_begin(self, logs=None):
            starts.append(snapshot(self.model))

    made = keras_tuner.RandomSearch(
        lp.FinetuneHyperModel(mlp(), 10), objective="val_loss", max_trials=1,
        executions_per_trial=2, directory=tmp_path,
    )  # fmt: skip
    made.search(
        x[:150], y[:150], validation_data=(x[150:], y[150:]), epochs=1, verbose=0,
        callbacks=[Look()],
    )  # fmt: skip
    assert len(starts) == 2
    assert_same(*starts)


def test_a_federated_trial_reports_rounds_and_continues(mlp, digits):
    x, y = digits
    clients = lp.partition((x, y), clients=4)
    hypermodel = lp.FederatedHyperModel(mlp(), 10, clients_per_round=2, learning_rate=0.1)
    together, hp = build(hypermodel, server_optimizer="none")
    history = hypermodel.fit(hp, together, clients, epochs=4, validation_data=(x, y), verbose=0)
    assert history.epoch == [0, 1, 2, 3]
    assert len(history.history["val_accuracy"]) == 4
    apart, hp = build(hypermodel, server_optimizer="none")
    hypermodel.fit(hp, apart, clients, epochs=2, verbose=0)
    rest = hypermodel.fit(hp, apart, clients, initial_epoch=2, epochs=4, verbose=0)
    assert rest.epoch == [2, 3]
    for a, b in zip(snapshot(together), snapshot(apart), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_federated_trials_share_features(mlp, digits, monkeypatch):
    x, y = digits
    clients, val = lp.partition((x, y), clients=4), (x[:50], y[:50])
    hypermodel = lp.FederatedHyperModel(mlp(), 10, learning_rate=0.1, optimizer="sgd")
    model, hp = build(hypermodel, server_optimizer="none")
    plain = lp.transfer_model(hypermodel.backbone, 10, optimizer="sgd", learning_rate=0.1)
    expected = lp.FederatedAveraging(plain).fit(clients, 2, validation_data=val, verbose=0).history
    computed = []
    take = FeatureCache.take

    def counted(self, data):
        computed.append(len(data[0]))
        return take(self, data)

    monkeypatch.setattr(FeatureCache, "take", counted)
    for _ in range(2):
        model, _ = build(hypermodel, server_optimizer="none")
        history = hypermodel.fit(
            hp, model, clients, epochs=2, validation_data=val, verbose=0
        ).history
        for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
            np.testing.assert_allclose(history[name], expected[name], rtol=1e-5)
        for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert computed == [50, 50, 50, 50, 50]  # four clients and the validation examples, once
    hypermodel.forget_features()
    assert not hypermodel._sources


def test_several_tasks_in_a_federation(mlp):
    model, _ = build(lp.FederatedHyperModel(mlp(), TASKS, trainable="head"))
    assert list(model.output) == ["digit", "even"]


def test_the_gain_compares_with_single_tasks(mlp, digits):
    x, y = digits
    data = x, {"digit": y, "even": y % 2}
    hypermodel = lp.MultitaskHyperModel(mlp(), TASKS)
    hypermodel.compare(data, validation_data=data, epochs=1)
    model, hp = build(hypermodel)
    logs = hypermodel.fit(hp, model, *data, validation_data=data, epochs=2, verbose=0).history
    single = {name: values[0] for name, values in hypermodel.comparison.single.items()}
    expected = [
        np.mean([100 * (logs[f"val_{n}_accuracy"][i] / single[n] - 1) for n in TASKS])
        for i in range(2)
    ]
    np.testing.assert_allclose(logs["val_gain"], expected, rtol=1e-5)


def test_a_lower_error_is_a_gain(mlp, digits):
    x, y = digits
    data = x, {"value": y.astype(float), "even": y % 2}
    hypermodel = lp.MultitaskHyperModel(mlp(), {"value": lp.Regression(), "even": 2})
    hypermodel.compare(data, validation_data=data, epochs=1)
    hypermodel.comparison.single["value"][:] = 1e6
    hypermodel.comparison.single["even"][:] = 1e-6
    model, hp = build(hypermodel)
    logs = hypermodel.fit(hp, model, *data, validation_data=data, verbose=0).history
    assert logs["val_gain"][0] > 0
    hypermodel.comparison.single["even"][:] = 1e6
    logs = hypermodel.fit(hp, model, *data, validation_data=data, verbose=0).history
    assert -1 < logs["val_gain"][0] < 0.5  # (100 - 100) / 2


def test_values_of_the_default_spaces():
    hp = HyperParameters()
    hp.values = {"hidden_units": 0, "augmentation": "none", "lora_rank": 0}
    assert space.hidden_units(hp) == ()
    assert space.augmentation(hp) is None
    assert space.lora(hp) is None
    assert space.server_optimizer(hp) is None


def test_checkpoints_are_those_of_the_best_epoch_with_its_optimizer(mlp, digits, tmp_path):
    x, y = digits
    seen = {}

    class Look(keras.callbacks.Callback):
        def __deepcopy__(self, memo):
            return self

        def on_epoch_end(self, epoch, logs=None):
            state = [np.array(v) for v in (*self.model.weights, *self.model.optimizer.variables)]
            seen[epoch] = logs["val_loss"], state

    made = keras_tuner.RandomSearch(
        lp.TransferHyperModel(mlp(), 10, hidden_units=(), dropout=0.0, schedule="constant"),
        objective=keras_tuner.Objective("val_loss", "max"), max_trials=1, directory=tmp_path,
    )  # fmt: skip
    made.search(
        x[:150], y[:150], validation_data=(x[150:], y[150:]), epochs=4, verbose=0,
        callbacks=[Look()],
    )  # fmt: skip
    best = max(seen, key=lambda epoch: seen[epoch][0])
    assert best == 0  # the loss falls, and "max" wants the highest
    (trial,) = made.oracle.get_best_trials(1)
    assert trial.score == pytest.approx(seen[0][0])
    model = made.load_model(trial)
    found = [np.array(v) for v in (*model.weights, *model.optimizer.variables)]
    assert_same(found, seen[0][1])


def test_a_users_tuner_with_hooks_of_steps_keeps_them(mlp, digits, tmp_path):
    x, y = digits
    steps = []

    class Own(keras_tuner.RandomSearch):
        def on_batch_end(self, trial, model, batch, logs=None):
            steps.append(batch)

    made = Own(lp.TransferHyperModel(mlp(), 10), objective="loss", max_trials=1, directory=tmp_path)
    made.search(x, y, epochs=2, batch_size=50, verbose=0)
    assert steps == [0, 1, 2, 3] * 2


def test_a_validation_split_is_not_in_the_first_phase(mlp):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 64)).astype("float32"), rng.integers(0, 2, 80)  # nothing to learn
    hypermodel = lp.FinetuneHyperModel(mlp((256,)), 2, learning_rate=1e-12, weight_decay=None)
    model, hp = build(hypermodel)
    logs = hypermodel.fit(hp, model, x, y, validation_split=0.5, verbose=0).history
    assert logs["accuracy"][0] > 0.9
    assert logs["val_accuracy"][0] < 0.75


@pytest.mark.parametrize(
    "arguments",
    [
        {"optimizer": keras.optimizers.Adam(1e-2), "learning_rate": None},
        {"augmentation": keras.layers.GaussianNoise(0.1, seed=3)},
    ],
    ids=["optimizer", "augmentation"],
)
def test_objects_with_state_are_new_in_each_trial(arguments, mlp, digits):
    hypermodel = lp.TransferHyperModel(mlp(), 10, hidden_units=(), **arguments)
    logs = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model, hp = build(hypermodel)
        logs.append(hypermodel.fit(hp, model, *digits, epochs=2, verbose=0).history["loss"])
    assert logs[0] == logs[1]


def test_other_arguments_of_fine_tuning(mlp, digits):
    model, _ = build(lp.FinetuneHyperModel(mlp(), 3, trainable=["block0"]))
    assert len(model.trainable_variables) == 4
    hypermodel = lp.FinetuneHyperModel(mlp(), 3, layer_rates={"block0": 0.0001, "head": 0.001})
    assert "layer_decay" not in searched(hypermodel)
    hypermodel = lp.FinetuneHyperModel(mlp(), 10, cache_features=True)
    model, hp = build(hypermodel)
    batches = Batches(*digits)
    history = hypermodel.fit(hp, model, batches, verbose=0)
    assert history.epoch == [0]


def test_adapters_take_no_part_in_other_choices(mlp, tmp_path):
    made = keras_tuner.RandomSearch(
        lp.FinetuneHyperModel(mlp(), 3, lora="search"), objective="loss", directory=tmp_path,
        max_trials=30, seed=1,
    )  # fmt: skip
    for i in range(10):
        trial = made.oracle.create_trial(f"t{i}")
        values = trial.hyperparameters.values
        assert ("layer_decay" in values) == (values["lora_rank"] == 0)
        assert ("trainable" in values) == (values["lora_rank"] == 0)


def test_a_solved_head_serves_every_dropout(mlp, digits, monkeypatch):
    from keras_lp.tuning import finetune

    solved = []
    fit_head = finetune.fit_head
    monkeypatch.setattr(finetune, "fit_head", lambda *a, **k: solved.append(1) or fit_head(*a, **k))
    hypermodel = lp.FinetuneHyperModel(mlp(), 10)
    for dropout in (0.0, 0.3, 0.5):
        model, hp = build(hypermodel, dropout=dropout)
        hypermodel.fit(hp, model, *digits, verbose=0)
    assert len(solved) == 1


def test_a_gain_over_nothing_is_an_error(mlp):
    comparison = lp.Comparison({"even": "accuracy"}, {"even": np.zeros(1)}, {}, {})
    with pytest.raises(ValueError, match=r"must not score 0. Received: 0 for \['even'\]"):
        lp.MultitaskHyperModel(mlp(), TASKS).use(comparison)


def test_the_callbacks_of_keras_tuner_are_known_by_name(mlp, digits, tmp_path):
    """An update that renames them would make trials slow again, and nothing else would tell."""
    seen = []

    class Look(lp.TransferHyperModel):
        def fit(self, hp, model, *args, **kwargs):
            seen.extend(type(one).__name__ for one in cheaper(kwargs["callbacks"]))
            return super().fit(hp, model, *args, **kwargs)

    made = keras_tuner.RandomSearch(
        Look(mlp(), 10), objective="loss", max_trials=1, directory=tmp_path
    )
    made.search(*digits, epochs=1, verbose=0)
    assert seen == ["_Epochs", "_SaveAtEnd"]
