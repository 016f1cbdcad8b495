"""Clients whose sequences differ in length, against Keras's own padding."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.federated.engine import installation

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
LENGTHS = {"a": 7, "b": 9, "c": 4}


def clients_of(make, classes=3, steps=False):
    """Ten examples for each client, of one length each."""
    rng = np.random.default_rng(0)
    found = {}
    for name, length in LENGTHS.items():
        shape = (10, length) if steps else 10
        found[name] = make(rng, length), rng.integers(0, classes, shape)
    return found


def tokens(rng, length):
    return rng.integers(1, 20, (10, length))


def padded(clients, value=0, missing=None):
    """All examples in one array, by Keras's `pad_sequences`."""
    pad = keras.utils.pad_sequences
    x = np.concatenate(
        [pad(x, maxlen=9, padding="post", value=value, dtype=x.dtype) for x, _ in clients.values()]
    )
    labels = [y for _, y in clients.values()]
    if missing is not None:
        labels = [pad(y, maxlen=9, padding="post", value=missing) for y in labels]
    return x, np.concatenate(labels)


def text_model(pooled=True):
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(20, 8, mask_zero=True),
        keras.layers.GRU(6, return_sequences=not pooled),
    ]
    return keras.Sequential(layers)


def build(**options):
    options = {"optimizer": "sgd", "learning_rate": 0.5, **options}
    return lp.transfer_model(text_model(), 3, **options)


def assert_same(ours, expected, atol=1e-5):
    for one, other in zip(ours.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def plain_keras():
    keras.utils.set_random_seed(0)
    layers = [*text_model().layers, keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((None,), dtype="int32"), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
    return model


def test_one_round_is_one_step_on_padded_examples():
    clients = clients_of(tokens)
    ours, central = plain_keras(), plain_keras()
    central.set_weights(ours.get_weights())
    x, y = padded(clients)
    central.fit(x, y, batch_size=30, verbose=0)
    federated = lp.FederatedAveraging(ours, batch_size=None)
    federated.fit(clients, 1, verbose=0)
    assert_same(ours, central)
    found = federated.evaluate(clients)
    expected = central.evaluate(x, y, batch_size=30, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize("loaded", [False, True])
def test_a_frozen_backbone_and_heads_that_are_solved(loaded):
    clients = clients_of(tokens)
    x, y = padded(clients)
    given = (list(clients), clients.__getitem__) if loaded else clients
    backbone = text_model()
    options = {"optimizer": "sgd", "learning_rate": 0.5}
    ours, central, solved = (lp.transfer_model(backbone, 3, **options) for _ in range(3))
    central.fit(x, y, batch_size=30, verbose=0)
    lp.FederatedAveraging(ours, batch_size=None).fit(given, 1, verbose=0)
    assert_same(ours, central)
    lp.FederatedAveraging(solved).fit_head(given, l2=1e-2, verbose=0)
    lp.fit_head(central, (x, y), l2=1e-2, verbose=0)
    np.testing.assert_allclose(
        solved.predict(x, verbose=0), central.predict(x, verbose=0), atol=1e-3
    )


def test_labels_for_each_step_are_missing_where_padded():
    """Client b has two steps more, without labels: it counts as before."""
    clients = clients_of(tokens, steps=True)
    parts = {"a": clients["a"], "b": tuple(part[:, :7] for part in clients["b"])}
    x, y = (np.concatenate(part) for part in zip(*parts.values(), strict=True))
    models = [
        lp.transfer_model(
            text_model(pooled=False), 3, pooling=None, trainable="all",
            optimizer="sgd", learning_rate=0.5,
        )
        for _ in range(2)
    ]  # fmt: skip
    models[1].set_weights(models[0].get_weights())
    models[0].fit(x, y, batch_size=20, verbose=0)
    federated = lp.FederatedAveraging(models[1], batch_size=None)
    federated.fit({"a": parts["a"], "b": _longer(*parts["b"])}, 1, verbose=0)
    assert_same(models[1], models[0])


def _longer(x, y):
    """The same examples with two more steps that Keras's mask leaves out."""
    return np.pad(x, ((0, 0), (0, 2))), np.pad(y, ((0, 0), (0, 2)), constant_values=-1)


def test_numbers_are_padded_with_the_value_that_is_masked():
    keras.utils.set_random_seed(0)
    clients = clients_of(lambda rng, length: rng.normal(size=(10, length, 2)).astype("float32"))
    backbone = keras.Sequential(
        [keras.Input((None, 2)), keras.layers.Masking(-5.0), keras.layers.LSTM(4)]
    )
    x, y = padded(clients, value=-5.0)
    models = [
        lp.transfer_model(keras.models.clone_model(backbone), 3, trainable="all", optimizer="sgd")
        for _ in range(2)
    ]
    models[1].set_weights(models[0].get_weights())
    models[0].fit(x, y, batch_size=30, verbose=0)
    lp.FederatedAveraging(models[1], batch_size=None).fit(clients, 1, verbose=0)
    assert_same(models[1], models[0])


def test_rounds_of_other_lengths_go_on():
    clients = clients_of(tokens)
    model = plain_keras()
    federated = lp.FederatedAveraging(model, clients_per_round=1, server_optimizer="adam", seed=3)
    history = federated.fit(clients, 5, verbose=0).history
    assert len(history["loss"]) == 5
    assert np.isfinite(history["loss"]).all()


def test_without_a_mask_lengths_must_agree():
    layers = [
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(20, 8),
        keras.layers.GlobalAveragePooling1D(),
    ]
    model = lp.transfer_model(keras.Sequential(layers), 3)
    with pytest.raises(ValueError, match=r"mask_zero=True.*padding_mask"):
        lp.FederatedAveraging(model).fit(clients_of(tokens), 1, verbose=0)


def ragged_client(steps=False):
    """Twelve texts of 1 to 6 tokens, as lists; labels, a class each or each step."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, 12)
    x = [rng.integers(1, 20, n).tolist() for n in lengths]
    return x, ([rng.integers(0, 3, n).tolist() for n in lengths] if steps else np.arange(12) % 3)


def generated(x, y):
    spec = tuple(
        tf.TensorSpec(() if np.ndim(part[0]) == 0 else (None,), tf.int32) for part in (x, y)
    )
    return tf.data.Dataset.from_generator(
        lambda: iter(zip(x, y, strict=True)), output_signature=spec
    )


def ragged(part):
    return tf.ragged.constant(part) if isinstance(part, list) else part


FORMS = {
    "lists": lambda x, y: (x, y),
    "ragged tensors": lambda x, y: (ragged(x), ragged(y)),
    "slices": lambda x, y: tf.data.Dataset.from_tensor_slices((ragged(x), ragged(y))),
    "generator": generated,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("steps", [False, True], ids=["class", "steps"])
def test_texts_of_one_client_may_differ_in_length(form, steps):
    x, y = ragged_client(steps)
    models = [
        lp.transfer_model(
            text_model(pooled=not steps), 3, pooling=None, trainable="all",
            optimizer="sgd", learning_rate=0.5,
        )
        for _ in range(2)
    ]  # fmt: skip
    models[1].set_weights(models[0].get_weights())
    pad = keras.utils.pad_sequences
    models[0].fit(
        pad(x, padding="post"),
        pad(y, padding="post", value=-1) if steps else y,
        batch_size=12,
        verbose=0,
    )
    lp.FederatedAveraging(models[1], batch_size=None).fit({"a": form(x, y)}, 1, verbose=0)
    assert_same(models[1], models[0])


def tagger(mask=True):
    """A plain Keras model with an output for each step."""
    keras.utils.set_random_seed(0)
    below = keras.Sequential([keras.layers.Embedding(20, 8, mask_zero=True)])
    conv = [] if mask else [keras.layers.Conv1D(8, 1)]
    model = keras.Sequential(
        [keras.Input((None,), dtype="int32"), below, *conv, keras.layers.Dense(3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
    return model


def test_labels_for_each_step_of_a_plain_model_count_where_keras_masks_nothing():
    x, y = ragged_client(steps=True)
    ours, central = tagger(), tagger()
    central.set_weights(ours.get_weights())
    arrays = [keras.utils.pad_sequences(part, padding="post") for part in (x, y)]
    expected = central.evaluate(*arrays, verbose=0, return_dict=True)
    federated = lp.FederatedAveraging(ours, batch_size=None)
    found = federated.evaluate({"a": (x, y)})
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    central.fit(*arrays, batch_size=12, verbose=0)
    federated.fit({"a": (x, y)}, 1, verbose=0)
    assert_same(ours, central)


@pytest.mark.filterwarnings("ignore:.*does not support masking")
def test_labels_for_each_step_need_a_mask_at_the_output():
    model = tagger(mask=False)
    with pytest.raises(ValueError, match=r"masks padding.*y of client 'a' with 1 to 6 steps"):
        lp.FederatedAveraging(model).fit({"a": ragged_client(steps=True)}, 1, verbose=0)


def test_ragged_texts_need_a_mask():
    layers = [
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(20, 8),
        keras.layers.GlobalAveragePooling1D(),
    ]
    model = lp.transfer_model(keras.Sequential(layers), 3)
    for form in FORMS.values():
        with pytest.raises(ValueError, match=r"mask_zero=True.*x of client 'a' with 1 to 6 steps"):
            lp.FederatedAveraging(model).fit({"a": form(*ragged_client())}, 1, verbose=0)


def test_single_examples_of_open_shape_and_batches_are_told_apart():
    x, y = ragged_client()
    data = generated(x, y)
    with pytest.raises(ValueError, match="batched data set"):
        lp.FederatedAveraging(build()).fit({"a": data.padded_batch(4)}, 1, verbose=0)
    numbers = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
    spec = (tf.TensorSpec((None,), tf.float32), tf.TensorSpec((), tf.int32))
    singles = tf.data.Dataset.from_generator(
        lambda: zip(numbers, y, strict=True), output_signature=spec
    )
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, "relu")])
    model = lp.transfer_model(backbone, 3, trainable="all", optimizer="sgd")
    expected = model.evaluate(numbers, y, verbose=0)
    found = lp.FederatedAveraging(model).evaluate({"a": singles})
    assert [found["loss"], found["accuracy"]] == pytest.approx(expected, abs=1e-6)


def test_strings_of_any_length_are_one_type():
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((1,), dtype="string"),
        keras.layers.Hashing(10),
        keras.layers.Embedding(10, 4),
        keras.layers.Flatten(),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential(layers)
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    words = {"a": ["good", "bad"], "b": ["terrible", "x"]}
    clients = {name: (np.array(own)[:, None], np.array([1, 0])) for name, own in words.items()}
    both = tf.constant([*words["a"], *words["b"]])[:, None]
    expected = model.evaluate(both, np.array([1, 0, 1, 0]), verbose=0)
    assert lp.FederatedAveraging(model).evaluate(clients)["loss"] == pytest.approx(expected)
