"""Federated averaging against plain Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.federated.engine import installation
from tests.conftest import with_random_heads

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def same(a, b, atol):
    for left, right in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, atol=atol, rtol=0)


def twin(model):
    """The same model for plain Keras, compiled in the same way."""
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    config = {**model._compile_config.config}
    config["optimizer"] = type(model.optimizer).from_config(model.optimizer.get_config())
    clone.compile(**config)
    return clone


def three_steps_equal_keras(model, digits, atol):
    """One client, three epochs of one batch: three steps of Keras."""
    central = twin(model)
    lp.FederatedAveraging(model, batch_size=None, local_epochs=3).fit(
        {"only": digits}, rounds=1, verbose=0
    )
    central.fit(*digits, batch_size=200, epochs=3, verbose=0)
    same(model, central, atol)


def test_equal_parts_and_one_sgd_step_equal_centralised_sgd(mlp, digits):
    model = lp.transfer_model(mlp(), 10, trainable="all", optimizer="sgd", learning_rate=0.5)
    central = twin(model)
    federated = lp.FederatedAveraging(model, batch_size=None)
    history = federated.fit(lp.partition(digits, clients=10), rounds=3, verbose=0)
    expected = central.fit(*digits, batch_size=200, epochs=3, verbose=0)
    same(model, central, 1e-5)
    for name in ("loss", "accuracy"):
        assert history.history[name] == pytest.approx(expected.history[name], abs=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        keras.optimizers.AdamW(1e-2, weight_decay=0.1, clipnorm=0.5),
        keras.optimizers.RMSprop(1e-3),
        keras.optimizers.Adagrad(1e-2),
        keras.optimizers.Adadelta(1.0),
        keras.optimizers.Adamax(1e-2),
        keras.optimizers.Lion(1e-3),
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, 10)),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_the_compiled_optimizer_trains_the_clients(mlp, digits, optimizer):
    model = lp.transfer_model(mlp(), 10, trainable="all", optimizer=optimizer)
    three_steps_equal_keras(model, digits, 1e-6)


def test_layer_rates_act_on_the_clients(mlp, digits):
    model = lp.finetune_model(
        lp.transfer_model(mlp((12, 8)), 10), learning_rate=1e-2, layer_decay=0.3, weight_decay=0.1
    )
    three_steps_equal_keras(model, digits, 1e-6)


def test_updates_are_weighted_by_examples(mlp, digits):
    """Two rounds of clients of 30 and 170 examples, by a NumPy average of Keras's results."""
    x, y = digits
    model = lp.transfer_model(mlp(), 10, trainable="all", optimizer="sgd", learning_rate=0.1)
    central = twin(model)
    clients = {"a": (x[:30], y[:30]), "b": (x[30:], y[30:])}
    lp.FederatedAveraging(model, batch_size=None, local_epochs=2).fit(clients, rounds=2, verbose=0)
    for _ in range(2):
        start, updates = central.get_weights(), []
        for part in clients.values():
            central.set_weights(start)
            central.fit(*part, batch_size=200, epochs=2, verbose=0)
            updates.append([w - s for w, s in zip(central.get_weights(), start, strict=True)])
        mean = [0.15 * a + 0.85 * b for a, b in zip(*updates, strict=True)]
        central.set_weights([s + m for s, m in zip(start, mean, strict=True)])
    same(model, central, 1e-6)


def test_every_example_is_seen_once_an_epoch(mlp, digits):
    """At a rate of nothing, the figures of a round are those of the examples it saw."""
    model = with_random_heads(lp.transfer_model(mlp(), 10, optimizer="sgd", learning_rate=1e-30))
    expected = model.evaluate(*digits, verbose=0, return_dict=True)
    for local_epochs in (1, 3):
        federated = lp.FederatedAveraging(model, batch_size=7, local_epochs=local_epochs)
        history = federated.fit({"only": digits}, rounds=1, verbose=0).history
        for name, value in expected.items():
            assert history[name][0] == pytest.approx(value, abs=1e-6)


def test_missing_labels_and_absent_tasks(mlp, digits):
    x, y = digits
    tasks = {"digit": 10, "value": lp.Regression(), "tags": lp.MultiLabel(2)}
    model = lp.multitask_model(mlp(), tasks, optimizer="sgd", learning_rate=0.1)
    central = twin(model)
    digit = np.where(np.arange(200) % 2 == 0, y, -1)
    lp.FederatedAveraging(model, batch_size=None).fit(
        {"only": (x, {"digit": digit})}, rounds=1, verbose=0
    )
    central.fit(x, {"digit": digit}, batch_size=200, verbose=0)
    same(model, central, 1e-6)


def test_clients_of_one_federation_may_lack_different_tasks(mlp, digits):
    x, y = digits
    model = lp.multitask_model(mlp(), {"digit": 10, "value": lp.Regression()})
    clients = {
        "a": (x[:50], {"digit": y[:50]}),
        "b": (x[50:], {"value": y[50:].astype("float32")}),
    }
    expected = model.evaluate(
        x,
        {"digit": np.where(np.arange(200) < 50, y, -1),
         "value": np.where(np.arange(200) < 50, np.nan, y)},
        verbose=0,
        return_dict=True,
    )  # fmt: skip
    federated = lp.FederatedAveraging(model, batch_size=None)
    history = federated.fit(clients, rounds=1, verbose=0).history
    for name, value in expected.items():  # before the step, over all labels that are there
        assert history[name][0] == pytest.approx(value, rel=1e-5)


def test_frozen_weights_stay_and_do_not_travel(convnet, digits):
    x, y = digits
    model = lp.transfer_model(convnet(), 10, pooling="avg")
    backbone = model.get_layer("convnet")
    before = [w.numpy().copy() for w in backbone.weights]
    history = lp.FederatedAveraging(model).fit(
        lp.partition((x.reshape(-1, 8, 8, 1), y), clients=4), rounds=2, verbose=0
    )
    for old, new in zip(before, backbone.weights, strict=True):
        np.testing.assert_array_equal(old, new.numpy())
    head = 4 * (8 * 10 + 10)  # bytes of a float32 head on 8 features
    sums, scale = 8 * (1 + 8 + 8), 4 * (8 + 8)  # in the first round, of and for the features
    assert history.history["bytes_up"] == [4 * (head + sums), 4 * head]
    assert history.history["bytes_down"] == [4 * (head + scale), 4 * head]
    assert history.history["clients"] == [4, 4]


def test_a_frozen_backbone_federates_as_it_trains_centrally(digits):
    x = digits[0].reshape(-1, 8, 8, 1)
    backbone = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()]
    )
    backbone(x, training=True)  # statistics that are not 0 and 1
    # Central training would standardise the features.
    model = lp.transfer_model(
        backbone, 10, optimizer="sgd", learning_rate=0.1, cache_features=False
    )
    central = twin(model)
    lp.FederatedAveraging(model, batch_size=None).fit({"only": (x, digits[1])}, 1, verbose=0)
    central.fit(x, digits[1], batch_size=200, verbose=0)
    same(model, central, 1e-6)


def test_dropout_draws_again_every_step(digits):
    """Of 64 constant inputs into a sum, the loss tells how many were dropped."""
    x = np.ones((20, 64), "float32")
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Identity()])
    model = lp.transfer_model(
        backbone, lp.Regression(), dropout=0.5, optimizer="sgd", learning_rate=1e-30
    )
    model.get_layer("predictions").kernel.assign(np.ones((64, 1)))
    clients = {"a": (x[:1], np.zeros(1, "float32"))}
    federated = lp.FederatedAveraging(model, local_epochs=2, batch_size=1)
    losses = federated.fit(clients, rounds=4, verbose=0).history["loss"]
    assert len(set(losses)) == 4
    one_step = lp.FederatedAveraging(model, local_epochs=1, batch_size=1, seed=0)
    first = one_step.fit(clients, rounds=1, verbose=0).history["loss"][0]
    assert losses[0] != first  # the mean of two different masks


def test_the_same_seed_gives_the_same_result(mlp, digits):
    def run(seed):
        keras.utils.set_random_seed(3)
        model = lp.transfer_model(mlp(), 10, trainable="all", dropout=0.3)
        clients = lp.partition(digits, clients=10, seed=1)
        lp.FederatedAveraging(model, clients_per_round=3, seed=seed).fit(clients, 2, verbose=0)
        return model

    same(run(0), run(0), 0)
    with pytest.raises(AssertionError):
        same(run(0), run(1), 1e-4)


def test_a_round_samples_without_replacement(digits):
    """Client i moves weight i alone, so the weights tell who took part."""
    backbone = keras.Sequential([keras.Input((6,)), keras.layers.Identity()])
    x, y = np.eye(6, dtype="float32"), np.ones(6, "float32")
    clients = {f"c{i}": (x[i : i + 1], y[i : i + 1]) for i in range(6)}
    model = lp.transfer_model(
        backbone, lp.Regression(), optimizer="sgd", learning_rate=0.1, cache_features=False
    )
    federated = lp.FederatedAveraging(model, clients_per_round=4, seed=2)
    seen = []
    for _ in range(4):
        before = model.get_weights()[0].copy()
        federated.fit(clients, 1, verbose=0)
        seen.append(tuple(np.flatnonzero(model.get_weights()[0] != before)))
    assert [len(moved) for moved in seen] == [4] * 4
    assert len(set(seen)) > 1


def test_a_second_fit_goes_on(mlp, digits):
    clients = lp.partition(digits, clients=5)
    at_once = lp.transfer_model(mlp(), 10, trainable="all")
    in_two = twin(at_once)
    arguments = {"clients_per_round": 2, "server_optimizer": keras.optimizers.SGD(0.5, 0.9)}
    lp.FederatedAveraging(at_once, **arguments).fit(clients, 4, verbose=0)
    federated = lp.FederatedAveraging(in_two, **arguments)
    federated.fit(clients, 2, verbose=0)
    history = federated.fit(clients, 2, verbose=0)
    same(at_once, in_two, 1e-7)
    assert history.epoch == [2, 3]


def test_training_between_two_fits_counts(mlp, digits):
    model = lp.transfer_model(mlp(), 10, optimizer="sgd", learning_rate=0.1)
    federated = lp.FederatedAveraging(model, batch_size=None)
    federated.fit({"only": digits}, 1, verbose=0)
    model.fit(*digits, batch_size=200, verbose=0)
    central = twin(model)
    federated.fit({"only": digits}, 1, verbose=0)
    central.fit(*digits, batch_size=200, verbose=0)
    same(model, central, 1e-6)


def test_the_server_optimizer_applies_the_mean_update(mlp, digits):
    """FedAdam, one round: Adam's first step is the rate times the sign of the update."""
    adam = keras.optimizers.Adam(0.01, epsilon=1e-12)
    clients = lp.partition(digits, clients=4)
    moved = {}
    for name, server in {"adam": adam, "mean": None, "half": keras.optimizers.SGD(0.5)}.items():
        keras.utils.set_random_seed(5)
        model = lp.transfer_model(
            mlp(), 10, optimizer="sgd", learning_rate=0.5, cache_features=False
        )
        head = model.get_layer("predictions")
        before = np.array(head.bias)
        lp.FederatedAveraging(model, batch_size=None, server_optimizer=server).fit(
            clients, 1, verbose=0
        )
        moved[name] = np.array(head.bias) - before
    np.testing.assert_allclose(moved["adam"], 0.01 * np.sign(moved["mean"]), rtol=1e-3)
    np.testing.assert_allclose(moved["half"], 0.5 * moved["mean"], rtol=1e-4)


def test_callbacks_validation_and_progress(mlp, digits, capsys):
    model = lp.transfer_model(mlp(), 10)
    seen = []

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((epoch, self.model is model, logs["val_accuracy"]))
            self.model.stop_training = epoch == 1

    validation = tf.data.Dataset.from_tensor_slices(digits).batch(50)
    history = lp.FederatedAveraging(model).fit(
        lp.partition(digits, clients=4), 5, validation_data=validation, callbacks=[Stop()]
    )
    assert [entry[:2] for entry in seen] == [(0, True), (1, True)]
    assert len(history.history["val_loss"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("Adam restarts on each client in each round")
    assert lines[0].endswith('with optimizer="sgd", or solve its heads with `fit_head`.')
    assert lines[1].startswith("Round 1/5 - ")
    assert "val_accuracy: " in lines[1]
    expected = model.evaluate(*digits, verbose=0, return_dict=True)
    assert history.history["val_loss"][-1] == pytest.approx(expected["loss"], abs=1e-5)


def test_unbatched_datasets_are_clients(mlp, digits):
    a = lp.transfer_model(mlp(), 10)
    b = twin(a)
    parts = lp.partition(digits, clients=3)
    lp.FederatedAveraging(a).fit(parts, 1, verbose=0)
    sets = {name: tf.data.Dataset.from_tensor_slices(part) for name, part in parts.items()}
    lp.FederatedAveraging(b).fit(sets, 1, verbose=0)
    same(a, b, 1e-6)  # the features of arrays are computed once, elsewhere


def test_a_plain_keras_model_with_ids_and_a_recurrent_layer(digits):
    x = (digits[0] * 15).astype("int32")[:, :10]
    model = keras.Sequential(
        [
            keras.Input((10,), dtype="int32"),
            keras.layers.Embedding(16, 4),
            keras.layers.GRU(4),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
    central = twin(model)
    history = lp.FederatedAveraging(model, batch_size=None).fit(
        lp.partition((x, digits[1]), clients=4), 2, verbose=0
    )
    central.fit(x, digits[1], batch_size=200, epochs=2, verbose=0)
    same(model, central, 1e-5)
    own = {"clients", "dropped", "update_norm", "bytes_up", "bytes_down", "seconds"}
    assert set(history.history) == {"loss", "accuracy", *own}


def plain(layers, optimizer=None, loss="mse", **compile_arguments):
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss, **compile_arguments)
    return model


def test_added_losses_count_on_clients(digits):
    penalised = keras.layers.Dense(
        4, activity_regularizer=keras.regularizers.L2(0.1), kernel_regularizer="l2"
    )
    model = plain([penalised, keras.layers.Dense(1)])
    central = twin(model)
    x, y = digits[0], digits[1].astype("float32")
    history = lp.FederatedAveraging(model, batch_size=None).fit({"a": (x, y)}, 1, verbose=0)
    expected = central.fit(x, y, batch_size=200, verbose=0)
    same(model, central, 1e-6)
    assert history.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)


def test_layers_that_hold_tensors_of_their_own(digits):
    def normalised():
        normalization = keras.layers.Normalization()
        normalization.adapt(digits[0])
        return plain([normalization, keras.layers.Dense(1)])

    model, central = normalised(), normalised()
    central.set_weights(model.get_weights())
    x, y = digits[0], digits[1].astype("float32")
    lp.FederatedAveraging(model, batch_size=None).fit({"a": (x, y)}, 1, verbose=0)
    central.fit(x, y, batch_size=200, verbose=0)
    same(model, central, 1e-6)


def test_state_that_nobody_averages_is_refused(digits):
    model = plain([keras.layers.SpectralNormalization(keras.layers.Dense(1))])
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"other state that changes in training.*spectral"):
        lp.FederatedAveraging(model).fit({"a": (digits[0], digits[1])}, 1, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_callbacks_set_the_clients_rate(digits):
    model = plain([keras.layers.Dense(1)])
    clients = {"a": (digits[0], digits[1].astype("float32"))}
    start = model.get_weights()
    federated = lp.FederatedAveraging(model, batch_size=None)
    still = keras.callbacks.LearningRateScheduler(lambda _: 0.0)
    federated.fit(clients, 2, callbacks=still, verbose=0)
    for old, new in zip(start, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    model.optimizer.learning_rate = 0.05
    central = twin(model)
    federated.fit(clients, 1, verbose=0)
    central.fit(*clients["a"], batch_size=200, verbose=0)
    same(model, central, 1e-6)


def test_what_is_compiled_again_takes_effect(mlp, digits):
    x, y = digits[0], digits[1].astype("float32")
    model = plain([keras.layers.Dense(1)])
    optimizer = model.optimizer
    federated = lp.FederatedAveraging(model, batch_size=None)
    federated.fit({"a": (x, y)}, 1, verbose=0)
    model.compile(optimizer, "mae", metrics=["mse"])
    central = twin(model)
    history = federated.fit({"a": (x, y)}, 1, verbose=0)
    central.fit(x, y, batch_size=200, verbose=0)
    same(model, central, 1e-6)
    assert "mse" in history.history

    class Recompile(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.compile("sgd", "mse")

    with pytest.raises(ValueError, match="recompiled since round 3"):
        federated.fit({"a": (x, y)}, 2, callbacks=[Recompile()], verbose=0)


def test_variables_excluded_from_weight_decay_stay_so(digits):
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.9)
    model = plain([keras.layers.Dense(1)], optimizer)
    optimizer.exclude_from_weight_decay(var_list=[model.layers[-1].kernel])
    central = keras.models.clone_model(model)
    central.set_weights(model.get_weights())
    excluding = keras.optimizers.AdamW(0.1, weight_decay=0.9)
    excluding.exclude_from_weight_decay(var_list=[central.layers[-1].kernel])
    central.compile(excluding, "mse")
    x, y = digits[0], digits[1].astype("float32")
    lp.FederatedAveraging(model, batch_size=None).fit({"a": (x, y)}, 1, verbose=0)
    central.fit(x, y, batch_size=200, verbose=0)
    same(model, central, 1e-6)


def test_plain_models_of_several_inputs_and_outputs(digits):
    inputs = {"z": keras.Input((64,), name="z"), "a": keras.Input((64,), name="a")}
    shared = keras.layers.Dense(4)(keras.layers.Concatenate()([inputs["z"], inputs["a"]]))
    outputs = {"v": keras.layers.Dense(1)(shared), "u": keras.layers.Dense(1)(shared)}
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.01), {"v": "mse", "u": "mae"})
    central = twin(model)
    x, y = digits[0], digits[1].astype("float32")
    data = ({"z": x, "a": x[:, ::-1]}, {"v": y, "u": -y})
    lp.FederatedAveraging(model, batch_size=None).fit({"c": data}, 1, verbose=0)
    central.fit(*data, batch_size=200, verbose=0)
    same(model, central, 1e-6)


def test_metrics_that_are_not_scalars(digits):
    labels = np.eye(10, dtype="float32")[digits[1]]
    model = plain([keras.layers.Dense(10, "softmax")], metrics=[keras.metrics.F1Score()])
    expected = model.evaluate(digits[0], labels, verbose=0, return_dict=True)
    history = lp.FederatedAveraging(model, batch_size=None).fit({"a": (digits[0], labels)}, 1)
    np.testing.assert_allclose(history.history["f1_score"][0], expected["f1_score"], atol=1e-6)


def test_bad_validation_data_are_refused_before_a_round(mlp, digits):
    model = lp.transfer_model(mlp(), 10)
    before = model.get_weights()
    federated = lp.FederatedAveraging(model)
    bad = (digits[0], digits[1] + 5)
    with pytest.raises(ValueError, match="y of validation_data"):
        federated.fit({"a": digits}, 1, validation_data=bad, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    weighted = (*digits, np.ones(200))
    history = federated.fit({"a": digits}, 1, validation_data=weighted, verbose=0)
    assert "val_loss" in history.history


def fit_with(model, clients, **arguments):
    return lambda: lp.FederatedAveraging(model, **arguments).fit(clients, 1, verbose=0)


def test_bad_clients_are_refused_before_a_round(mlp, digits):
    x, y = digits
    model = lp.transfer_model(mlp(), 10)
    good = (x[:5], y[:5])
    unbatched = tf.data.Dataset.from_tensor_slices(digits)
    cases = [
        ({}, ValueError, "at least one client"),
        ([good], TypeError, "lp.partition"),
        ({"a": good, "b": (x[:0], y[:0])}, ValueError, "no example of client 'b'"),
        ({"a": unbatched.batch(15)}, ValueError, "unbatch"),
        ({"a": unbatched.batch(20, drop_remainder=True)}, ValueError, "unbatch"),
        ({"a": unbatched.repeat()}, ValueError, "an endless data set"),
        ({"a": unbatched.map(lambda x, y: x)}, ValueError, r"pairs \(x, y\)"),
        ({"a": (x[:5], {"predictions": y[:5]})}, ValueError, "one output"),
        ({"a": ({"x": x[:5]}, y[:5])}, ValueError, "structure of the model"),
        ({"a": (x[:5, :3], y[:5])}, ValueError, r"\(64,\)"),
        ({"a": (x[:5], y[:4])}, ValueError, r"lengths \[4, 5\]"),
        ({"a": (x[:5] * np.nan, y[:5])}, ValueError, "finite.*client 'a'"),
        ({"a": (x[:5], y[:5] + 9)}, ValueError, "class numbers from 0 to 9.*client 'a'"),
        ({"a": x}, TypeError, r"pair \(x, y\)"),
        ({"a": good, "b": (x[:5].astype("float64"), y[:5])}, ValueError, "one structure"),
    ]
    before = model.get_weights()
    for clients, error, message in cases:
        with pytest.raises(error, match=message):
            fit_with(model, clients)()
    with pytest.raises(ValueError, match="clients_per_round=3 for 2 clients"):
        fit_with(model, {"a": good, "b": good}, clients_per_round=3)()
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_models_that_cannot_federate_are_refused(mlp, convnet, digits):
    def compiled(optimizer):
        return lp.transfer_model(mlp(), 10, optimizer=optimizer)

    trainable_norm = lp.transfer_model(convnet(), 10, pretrained=False, trainable="all")
    ema = compiled(keras.optimizers.SGD(0.1, use_ema=True))
    accumulating = compiled(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))

    class OwnStep(keras.Model):
        def train_step(self, data):
            return {}

    inputs = keras.Input((64,))
    own_step = OwnStep(inputs, keras.layers.Dense(10)(inputs))
    own_step.compile("sgd", "mse")
    fixed = keras.Sequential([keras.Input(batch_shape=(5, 64)), keras.layers.Dense(1)])
    fixed.compile("sgd", "mse")
    cases = [
        (trainable_norm, ValueError, r"BatchNormalization.*block1_bn.*GroupNormalization"),
        (ema, ValueError, "use_ema=True"),
        (accumulating, ValueError, "gradient_accumulation_steps=2"),
        (mlp(), ValueError, "compiled with a loss"),
        (compiled("nadam"), ValueError, "one of SGD, Adam, AdamW, RMSprop, Adagrad.*Nadam"),
        (own_step, ValueError, "custom `train_step`"),
        (fixed, ValueError, "a fixed batch size"),
        ("mlp", TypeError, "compiled Keras model"),
    ]
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            lp.FederatedAveraging(model)
    for arguments in (
        {"clients_per_round": 0}, {"local_epochs": 1.5}, {"batch_size": -1}, {"seed": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(arguments))):
            lp.FederatedAveraging(compiled("sgd"), **arguments)
    for arguments, message in (
        ({"server_optimizer": "yogy"}, "Did you mean 'yogi"),
        ({"proximal_strength": -1.0}, "proximal_strength=-1.0"),
        ({"weighting": "exmples"}, "Did you mean 'examples"),
    ):
        with pytest.raises(ValueError, match=message):
            lp.FederatedAveraging(compiled("sgd"), **arguments)
    stale = compiled("sgd")
    stale.get_layer("mlp").trainable = True
    with pytest.raises(ValueError, match="last `compile`"):
        lp.FederatedAveraging(stale).fit({"a": digits}, 1)
