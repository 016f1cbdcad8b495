"""What kinds of models federate, each against plain Keras or NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.federated.engine import worker as worker_module
from keras_lp.federated.engine.groups import Groups

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def same(a, b, atol=1e-5):
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, atol=atol, rtol=0)


def multitask(mlp, hidden_units=()):
    tasks = {"digit": 10, "value": lp.Regression(mean=4.5, std=3), "never": 2}
    return lp.multitask_model(
        mlp(), tasks, hidden_units=hidden_units, optimizer="sgd", learning_rate=0.1
    )


def test_a_head_counts_by_its_labels_and_the_shared_part_by_examples(mlp, digits):
    """Keras's own update of each client, put together by hand with a weight a head."""
    x, y = digits
    model = multitask(mlp)
    start = model.get_weights()
    kernels = {name: np.array(model.get_layer(name).kernel) for name in ("digit", "never")}
    some = np.where(np.arange(60) < 20, y[:60], -1)
    clients = {
        "a": (x[:60], {"digit": some, "value": y[:60].astype("float32")}),
        "b": (x[60:100], {"digit": y[60:100]}),
    }
    updates = []
    for x_own, y_own in clients.values():
        model.set_weights(start)
        model.fit(x_own, y_own, batch_size=60, epochs=2, verbose=0)
        updates.append([w - s for w, s in zip(model.get_weights(), start, strict=True)])
    model.set_weights(start)
    lp.FederatedAveraging(model, batch_size=None, local_epochs=2).fit(clients, 1, verbose=0)
    counts = {"mlp": (60, 40), "digit": (20, 40), "value": (60, 0), "never": (1, 1)}
    weight_of = [
        counts[layer.name] for layer in model.layers if layer.weights for _ in layer.weights
    ]
    expected = [
        s + (a * u + b * v) / (a + b)
        for s, u, v, (a, b) in zip(start, *updates, weight_of, strict=True)
    ]
    same(model.get_weights(), expected)
    assert np.abs(model.get_layer("digit").kernel - kernels["digit"]).max() > 1e-3
    np.testing.assert_array_equal(model.get_layer("never").kernel, kernels["never"])


def test_hidden_layers_of_a_head_belong_to_it_and_uniform_counts_who_has_labels(mlp, digits):
    model = multitask(mlp, hidden_units=[4])
    y = {"digit": np.array([1, -1, 2]), "value": np.full(3, np.nan), "never": -np.ones(3)}
    data = digits[0][:3], y
    examples, uniform = Groups(model, "examples"), Groups(model, "uniform")
    by_name = {
        v.path.split("/")[-2]: group
        for v, group in zip(model.trainable_variables, examples.of_variables, strict=True)
    }
    assert by_name["block0"] == 0
    of_task = {name: by_name[name] for name in ("digit", "value", "never")}
    assert sorted(of_task.values()) == [1, 2, 3]
    assert all(by_name[f"{name}_hidden_0"] == group for name, group in of_task.items())
    for groups, expected in ((examples, [3, 2, 0, 0]), (uniform, [1, 1, 0, 0])):
        shares = groups.shares(data)
        ordered = [shares[0], *(shares[of_task[name]] for name in ("digit", "value", "never"))]
        np.testing.assert_array_equal(ordered, expected)


def wire_bytes(model, data, **arguments):
    """Bytes to and from the worker in the second round."""
    federated = lp.FederatedAveraging(model, batch_size=None, **arguments)
    worker = worker_module.load_worker()
    federated.fit(data, 1, verbose=0)
    before = worker.bytes_sent, worker.bytes_received
    federated.fit(data, 1, verbose=0)
    return worker.bytes_sent - before[0], worker.bytes_received - before[1]


def test_features_once_give_the_same_weights_and_little_goes_over_the_wire(mlp, digits):
    """Neither the frozen weights (2.3 MB) nor the clients' data (1 MB)."""
    x, y = (np.concatenate([part] * 20) for part in digits)
    clients = lp.partition((x, y), 4, seed=1)
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        backbone = mlp((1000, 500, 8))
        models.append(lp.transfer_model(backbone, 10, optimizer="sgd", learning_rate=0.5))
    assert sum(v.numpy().nbytes for v in models[0].non_trainable_variables) > 2e6
    assert x.nbytes > 1e6
    loaded = (list(clients), clients.__getitem__)  # whose features are computed in every round
    for model, data in zip(models, (clients, loaded), strict=True):
        sent, received = wire_bytes(model, data)
        assert sent < 250_000
        assert received < 10_000
    same(models[0].get_weights(), models[1].get_weights())


def test_the_backbone_runs_once_a_client_and_not_for_data_that_may_change(mlp, digits, monkeypatch):
    from keras_lp.federated.clients import source

    model = lp.transfer_model(mlp(), 10)
    arrays = lp.partition(digits, 3)
    calls = []
    compute = source.replace_inputs
    monkeypatch.setattr(source, "replace_inputs", lambda *a: calls.append(1) or compute(*a))
    federated = lp.FederatedAveraging(model)
    federated.fit(arrays, 3, verbose=0)
    assert len(calls) == 3
    found = federated.evaluate(arrays)
    expected = model.evaluate(*digits, verbose=0, return_dict=True)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert len(calls) == 6
    federated.fit((list(arrays), arrays.__getitem__), 1, verbose=0)
    assert len(calls) == 6


def test_thresholds_chosen_between_two_fits_change_f1_and_nothing_else(mlp, digits, tmp_path):
    """The federation goes on, its checkpoints too; its f1 is Keras's with the new thresholds."""
    x, y = digits
    tags = np.stack([y == 3, y % 2 == 0, y > 7], axis=-1).astype("int32")
    clients = {"a": (x[:120], tags[:120]), "b": (x[120:], tags[120:])}
    weights, logs = [], []
    for chosen in (False, True):
        keras.utils.set_random_seed(0)
        model = lp.transfer_model(mlp(), lp.MultiLabel(3), optimizer="sgd", learning_rate=0.1)
        federated = lp.FederatedAveraging(model)
        arguments = {"verbose": 0, "checkpoint_dir": tmp_path / str(chosen)}
        federated.fit(clients, 1, **arguments)
        before = federated.evaluate(clients)
        if chosen:
            thresholds = lp.choose_thresholds(model, (x, tags))
            found = federated.evaluate(clients)
            expected = model.evaluate(x, tags, verbose=0, return_dict=True)
            assert found["f1"] == pytest.approx(expected["f1"], abs=1e-6)
            assert found["f1"] > before["f1"] + 0.05
            assert found["loss"] == pytest.approx(before["loss"], abs=1e-6)
        logs.append(federated.fit(clients, 1, **arguments).history)
        weights.append(model.get_weights())
    same(*weights, atol=0)
    assert logs[0]["loss"] == logs[1]["loss"]
    assert logs[0]["f1"][-1] != logs[1]["f1"][-1]
    assert model.get_layer("predictions").task.thresholds == tuple(thresholds)


def test_lora_trains_its_adapters_as_keras_does(mlp, digits):
    def adapted():
        keras.utils.set_random_seed(2)
        model = lp.transfer_model(mlp(), 10)
        return lp.finetune_model(model, lora=lp.LoRA(rank=2), optimizer="sgd", learning_rate=0.1)

    model, central = adapted(), adapted()
    lp.FederatedAveraging(model, batch_size=None, local_epochs=2).fit({0: digits}, 1, verbose=0)
    central.fit(*digits, batch_size=200, epochs=2, verbose=0)
    same(model.get_weights(), central.get_weights())


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_sequence_models_train_as_in_keras(digits, kind):
    ids = (digits[0] * 15).astype("int32")[:40, :8]

    def sequence_model():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((8,), dtype="int32")
        x = keras.layers.Embedding(16, 4, mask_zero=kind == "lstm")(inputs)
        if kind == "lstm":
            x = keras.layers.LSTM(4)(x)
        else:
            x = keras.layers.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True)
            x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
        model = keras.Model(inputs, keras.layers.Dense(10)(x))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
        return model

    model, central = sequence_model(), sequence_model()
    data = ids, digits[1][:40]
    lp.FederatedAveraging(model, batch_size=None, local_epochs=2).fit({0: data}, 1, verbose=0)
    central.fit(*data, batch_size=40, epochs=2, verbose=0)
    same(model.get_weights(), central.get_weights())


WORDS = np.array(["good movie", "bad film", "good film", "bad movie"])


def of_words(layer, dtype="string"):
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((1,), dtype=dtype),
        layer,
        keras.layers.Embedding(20, 4),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(1, "sigmoid"),
    ]
    model = keras.Sequential(layers)
    model.compile("sgd", "binary_crossentropy")
    return model


def vectorization():
    layer = keras.layers.TextVectorization(max_tokens=20, output_sequence_length=4, name="words")
    layer.adapt(WORDS)
    return of_words(layer), WORDS[:, None]


LOOKUPS = {
    "TextVectorization": vectorization,
    "StringLookup": lambda: (
        of_words(keras.layers.StringLookup(vocabulary=[*WORDS], name="words")),
        WORDS[:, None],
    ),
    "IntegerLookup": lambda: (
        of_words(keras.layers.IntegerLookup(vocabulary=[3, 5], name="words"), "int64"),
        np.array([[3], [5], [3], [5]]),
    ),
}


@pytest.mark.parametrize("make", LOOKUPS.values(), ids=LOOKUPS)
def test_tables_are_refused_by_layer_before_a_round(make):
    model, x = make()
    y = np.array([1, 0, 1, 0])
    model.fit(tf.constant(x), y, verbose=0)  # Keras itself trains it
    before = model.get_weights()
    federated = lp.FederatedAveraging(model)
    for call in (lambda data: federated.fit(data, 1, verbose=0), federated.evaluate):
        with pytest.raises(ValueError, match=r"the layers \['words'.*Apply them to the data first"):
            call({"a": (x, y)})
    assert federated.rounds_done == 0
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_way_out_of_a_table_trains():
    layer = keras.layers.StringLookup(vocabulary=[*WORDS])
    x = layer(tf.constant(WORDS[:, None])).numpy()
    model = of_words(keras.layers.Identity(), "int64")
    history = lp.FederatedAveraging(model).fit({"a": (x, np.array([1, 0, 1, 0]))}, 2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize("variable", [tf.Variable, keras.Variable])
def test_a_loss_with_a_variable_is_refused(variable):
    factor = variable(2.0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", lambda y, p: factor * keras.ops.mean(keras.ops.square(y - p), -1))
    x = np.ones((6, 4), "float32")
    model.fit(x, x[:, :1], verbose=0)
    with pytest.raises(ValueError, match=r"no variable that is not a weight.*whose loss, metrics"):
        lp.FederatedAveraging(model).fit({"a": (x, x[:, :1])}, 1, verbose=0)
