"""Features computed once: the same result as plain Keras."""

import gc
import os
import re
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.backbones import features
from keras_lp.model import scaling
from tests.conftest import Batches

SHAPE = (8, 8, 3)


@pytest.fixture(autouse=True)
def _unscaled(monkeypatch):
    """Leaves features as they are, as plain Keras does."""
    monkeypatch.setattr(scaling, "_is_wanted", lambda model: False)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50, *SHAPE)).astype("uint8")
    return x, rng.integers(0, 3, 50)


def sequential():
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Dropout(0.5),
        ]
    )


def residual():
    inputs = x = keras.Input(SHAPE)
    x = keras.layers.Rescaling(1 / 255)(x)
    x = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Conv2D(4, 3, padding="same")(x))
    y = keras.layers.SpatialDropout2D(0.5)(keras.layers.Conv2D(4, 3, padding="same")(x))
    return keras.Model(inputs, keras.layers.Add()([x, y]))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = sequential()
        self.norm = keras.layers.BatchNormalization(momentum=0.5)
        self.drop = keras.layers.Dropout(0.9)

    def call(self, x, training=None):
        return self.drop(self.norm(self.inner(x, training=training), training=training))


BACKBONES = {"sequential": sequential, "residual": residual, "subclassed": Subclassed}


def shaken(backbone):
    """Gives BatchNormalization statistics that differ from those of any batch."""
    rng = np.random.default_rng(1)
    for variable in backbone.weights:
        if "moving" in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return backbone


def build(backbone=None, **kwargs):
    keras.utils.set_random_seed(0)
    backbone = shaken(backbone or sequential())
    kwargs = {"pooling": "avg", "learning_rate": 0.1, **kwargs}
    return lp.transfer_model(backbone, 3, input_shape=SHAPE, **kwargs)


def twins(fit, **kwargs):
    """Trains the same model cached and as plain Keras does."""
    made = []
    for cache in (True, False):
        model = build(cache_features=cache, **kwargs)
        keras.utils.set_random_seed(1)
        made.append((model, fit(model).history))
    return made


def assert_same(made):
    (cached, history), (plain, expected) = made
    assert history.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name], atol=1e-5, err_msg=name)
    for a, b in zip(cached.trainable_weights, plain.trainable_weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("cache", [True, False])
def test_a_frozen_backbone_is_bit_equal_after_fit(name, cache, data):
    model = build(BACKBONES[name](), cache_features=cache)
    backbone = model.layers[1]
    before = [np.array(weight) for weight in backbone.weights]
    assert len(before) > 4
    model.fit(*data, epochs=2, validation_data=data, verbose=0)
    for old, new in zip(before, backbone.weights, strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_head_equals_one_that_plain_keras_trains_on_the_features(name, data):
    x, y = data
    model = build(BACKBONES[name]())
    backbone = model.layers[1]
    values = np.asarray(backbone(x.astype("float32"), training=False)).mean((1, 2))
    head = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    head.set_weights(model.get_layer("predictions").get_weights()[:2])
    head.compile(
        keras.optimizers.Adam(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(x, y, epochs=3, batch_size=16, shuffle=False, verbose=0)
    head.fit(values, y, epochs=3, batch_size=16, shuffle=False, verbose=0)
    for ours, plain in zip(model.trainable_weights, head.trainable_weights, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"shuffle": False},
        {"shuffle": True, "batch_size": 7},
        {"class_weight": {0: 1.0, 1: 5.0, 2: 0.5}},
        {"sample_weight": np.linspace(0, 2, 50)},
        {"validation_split": 0.3, "sample_weight": np.linspace(0, 2, 50)},
        {"validation_split": 0.3, "validation_batch_size": 4},
        {"validation_split": 0.3, "validation_freq": 2},
        {"initial_epoch": 2},
        {"steps_per_epoch": 3, "batch_size": 5},
        {"validation_split": 0.3, "validation_steps": 1, "batch_size": 5},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_arguments_of_fit_act_as_in_keras(arguments, data):
    assert_same(twins(lambda model: model.fit(*data, epochs=3, verbose=0, **arguments)))


@pytest.mark.parametrize("weights", [False, True])
def test_validation_data_are_cached_too(weights, data):
    x, y = data
    held = (x[:20], y[:20], np.linspace(0, 1, 20)) if weights else (x[:20], y[:20])
    assert_same(twins(lambda model: model.fit(x, y, epochs=2, verbose=0, validation_data=held)))


@pytest.mark.parametrize("kind", ["dataset", "unknown length", "pydataset"])
@pytest.mark.parametrize("weighted", [False, True])
def test_data_sets_are_cached_where_the_user_says_so(kind, weighted, data):
    arrays = (*data, np.linspace(0, 2, 50)) if weighted else data

    def fit(model):
        batches = tf.data.Dataset.from_tensor_slices(arrays).batch(10)
        if kind == "pydataset":
            batches = Batches(*arrays, size=10)
        elif kind == "unknown length" and features.features_layer(model).cache:
            batches = batches.filter(lambda *_: True)  # Keras itself warns about such a data set
        return model.fit(
            batches, epochs=3, shuffle=False, verbose=0, validation_data=batches,
            class_weight=None if weighted else {0: 2.0, 1: 1.0, 2: 1.0},
        )  # fmt: skip

    assert_same(twins(fit))


def test_a_cached_data_set_is_shuffled_unless_told_otherwise(data):
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(10)
    weights = {}
    for shuffle in (True, False):
        model = build(cache_features=True)
        model.fit(dataset, epochs=3, shuffle=shuffle, verbose=0)
        weights[shuffle] = np.array(model.trainable_weights[0])
    assert np.abs(weights[True] - weights[False]).max() > 1e-3


class Counting(keras.layers.Layer):
    """Counts the examples that pass it."""

    def __init__(self):
        super().__init__()
        self.seen = tf.Variable(0, dtype="int64", trainable=False)
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        self.seen.assign_add(tf.shape(x, out_type="int64")[0])
        return x * self.scale


def counting_backbone():
    layer = Counting()
    return keras.Sequential([keras.Input(SHAPE), keras.layers.Rescaling(1 / 255), layer]), layer


def passes(fit, **kwargs):
    backbone, layer = counting_backbone()
    model = lp.transfer_model(backbone, 3, **kwargs)
    layer.seen.assign(0)
    fit(model)
    return int(layer.seen.numpy())


def test_the_backbone_sees_each_example_once(data):
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(10)
    held = (data[0][:20], data[1][:20])

    def arrays(model):
        model.fit(*data, epochs=4, verbose=0, validation_data=held)

    def data_set(model):
        model.fit(dataset, epochs=4, verbose=0, validation_data=dataset)

    assert passes(arrays) == 50 + 20
    assert passes(arrays, cache_features=False) == 4 * (50 + 20)
    assert passes(data_set, cache_features=True) == 50 + 50
    assert passes(data_set) == 4 * (50 + 50)  # "auto" leaves data sets alone
    tensors = (tf.constant(data[0]), tf.constant(data[1]))
    assert passes(lambda model: model.fit(*tensors, epochs=4, verbose=0)) == 50


def test_what_changes_from_epoch_to_epoch_is_not_cached(data):
    def fit(model):
        model.fit(*data, epochs=2, verbose=0)

    assert passes(fit, augmentation="light") == 100
    assert passes(fit, trainable="all") == 100
    assert passes(fit, trainable=1) == 100

    def fine_tuned(model):
        fit(lp.finetune_model(model))

    assert passes(fine_tuned) == 100

    def frozen_again(model):
        fit(lp.finetune_model(lp.finetune_model(model), trainable="head"))

    assert passes(frozen_again) == 50


@pytest.mark.parametrize(
    "name", ["train_step", "test_step", "call", "compute_loss", "evaluate", "make_train_function"]
)
def test_a_step_of_the_users_own_turns_it_off(name, data):
    class Own(lp.Model):
        pass

    setattr(Own, name, lambda self, *args, **kwargs: getattr(lp.Model, name)(self, *args, **kwargs))
    backbone, layer = counting_backbone()
    built = lp.transfer_model(backbone, 3)
    model = Own(built.input, built.output)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    layer.seen.assign(0)
    model.fit(*data, epochs=3, verbose=0)
    assert layer.seen.numpy() == 150


def test_callbacks_see_the_whole_model(data, tmp_path):
    x, _ = data
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(batch)

        def on_epoch_end(self, epoch, logs=None):
            self.predictions = self.model.predict(x, verbose=0)
            self.logs = self.model.evaluate(*data, verbose=0, return_dict=True)
            self.model.stop_training = epoch == 1

    model, look = build(), Look()
    save = keras.callbacks.ModelCheckpoint(tmp_path / "m.keras")
    history = model.fit(*data, epochs=9, batch_size=10, verbose=0, callbacks=[look, save])
    assert len(history.history["loss"]) == 2
    assert seen == [0, 1, 2, 3, 4] * 2
    np.testing.assert_array_equal(look.predictions, model.predict(x, verbose=0))
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(look.predictions, loaded.predict(x, verbose=0))
    assert look.logs == model.evaluate(*data, verbose=0, return_dict=True)


def test_callbacks_by_epoch_act_as_in_keras(data):
    def fit(model):
        callbacks = [
            keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 2),
        ]
        return model.fit(*data, epochs=12, batch_size=10, verbose=0, callbacks=callbacks)

    made = twins(fit)
    assert_same(made)
    assert 1 < len(made[0][1]["loss"]) < 12
    model, _ = made[0]
    assert model.steps_per_execution == 1
    assert model.predict(data[0], batch_size=10, verbose=0).shape == (50, 3)


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_what_exceeds_the_memory_goes_to_files_that_are_removed(kind, data, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            folders.append(len(list(tmp_path.glob("keras_lp*/*"))))

    def fit(model):
        x = data if kind == "arrays" else (tf.data.Dataset.from_tensor_slices(data).batch(10),)
        return model.fit(
            *x, epochs=3, shuffle=False, batch_size=10, verbose=0, callbacks=[Look()],
            validation_data=(data[0][:20], data[1][:20]),
            sample_weight=np.linspace(0, 2, 50) if kind == "arrays" else None,
        )  # fmt: skip

    assert_same(twins(fit, cache_memory=500))
    assert folders[0] >= 1
    assert folders[1] == 0
    assert not list(tmp_path.glob("keras_lp*"))


def test_files_are_shuffled_and_split_too(data):
    def fit(model):
        return model.fit(*data, epochs=6, verbose=0, validation_split=0.4, shuffle=True)

    (cached, history), (_, expected) = twins(fit, cache_memory=100)
    assert len(history["val_loss"]) == 6
    np.testing.assert_allclose(history["val_loss"][-1], expected["val_loss"][-1], atol=0.05)
    assert features.features_layer(cached).memory == 100


def test_files_are_removed_after_an_exception(data, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert list(tmp_path.glob("keras_lp*"))
            raise KeyboardInterrupt

    model = build(cache_memory=100)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*data, verbose=0, callbacks=[Stop()])
    assert not list(tmp_path.glob("keras_lp*"))
    model.fit(*data, verbose=0)


def test_progress_is_shown_while_features_are_computed(data, capsys):
    model = build()
    model.fit(*data, verbose=1)
    assert "Features of the frozen backbone, computed once" in capsys.readouterr().out
    model.fit(*data, verbose=0)
    assert capsys.readouterr().out == ""


def test_missing_labels_of_several_tasks_count_as_without_cache(data):
    x, y = data
    labels = {"a": np.where(np.arange(50) % 3, y, -1), "b": np.where(y > 0, y / 2.0, np.nan)}
    made = []
    for cache in ("auto", False):
        keras.utils.set_random_seed(0)
        model = lp.multitask_model(
            sequential(), {"a": 3, "b": lp.Regression()}, trainable="head", cache_features=cache
        )
        made.append((model, model.fit(x, labels, epochs=3, verbose=0).history))
    assert_same(made)


def test_features_under_several_named_inputs():
    inputs = {"p": keras.Input((4,), name="p"), "q": keras.Input((4,), name="q")}
    backbone = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Add()(list(inputs.values()))))
    x = {name: np.random.default_rng(0).normal(size=(30, 4)) for name in inputs}
    y = np.arange(30) % 2
    made = []
    for cache in ("auto", False):
        keras.utils.set_random_seed(0)
        model = lp.transfer_model(backbone, 2, cache_features=cache)
        made.append((model, model.fit(x, y, epochs=2, verbose=0).history))
    assert_same(made)


def test_a_sequence_keeps_one_prediction_a_step():
    backbone = keras.Sequential([keras.Input((7, 5)), keras.layers.Dense(4)])
    x = np.random.default_rng(0).normal(size=(20, 7, 5)).astype("float32")
    y = np.where(x[..., 0] > 1, -1, (x[..., 0] > 0).astype(int))
    made = []
    for cache in ("auto", False):
        keras.utils.set_random_seed(0)
        model = lp.transfer_model(backbone, 2, pooling=None, cache_features=cache)
        made.append((model, model.fit(x, y, epochs=2, verbose=0).history))
    assert_same(made)
    assert made[0][0].output_shape == (None, 7, 2)


def test_features_keep_their_mask():
    backbone = keras.Sequential([keras.Input((6,)), keras.layers.Embedding(9, 4, mask_zero=True)])
    x = np.random.default_rng(0).integers(0, 9, (20, 6))
    made = []
    for cache in ("auto", False):
        keras.utils.set_random_seed(0)
        model = lp.transfer_model(backbone, 2, pooling=None, cache_features=cache)
        made.append((model, model.fit(x, x % 2, epochs=2, verbose=0).history))
    assert_same(made)


def test_the_setting_survives_saving_and_cloning(data, tmp_path):
    model = build(cache_features=True, cache_memory=10**6)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    cloned = keras.models.clone_model(model)
    for copy in (loaded, cloned):
        layer = features.features_layer(copy)
        assert (layer.cache, layer.memory) == (True, 10**6)
    before = loaded.evaluate(*data, verbose=0)
    assert before == model.evaluate(*data, verbose=0)
    loaded.fit(*data, verbose=0)


def test_mixed_precision_caches_what_the_backbone_gives(data):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        made = twins(lambda model: model.fit(*data, epochs=2, shuffle=False, verbose=0))
    finally:
        keras.config.set_dtype_policy("float32")
    (_, history), (_, expected) = made
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-2)


def noise(x):
    return x + tf.random.normal(tf.shape(x), stddev=100.0)


class Sampling(keras.layers.Layer):
    """Random in inference too."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)


def with_sampling():
    return keras.Sequential([keras.Input(SHAPE), keras.layers.Dense(4), Sampling()])


def with_penalty():
    conv = keras.layers.Conv2D(4, 3, activity_regularizer="l2")
    return keras.Sequential([keras.Input(SHAPE), conv])


def with_fixed_batch():
    inputs = keras.Input(batch_shape=(10, *SHAPE))
    return keras.Model(inputs, keras.layers.Dense(4)(inputs))


@pytest.mark.parametrize(
    ("make", "arguments", "reason"),
    [
        (
            sequential,
            {"augmentation": keras.layers.Lambda(noise, output_shape=lambda shape: shape)},
            "'augmentation' is random",
        ),
        (with_sampling, {}, "sampling.* is random"),
        (with_penalty, {}, "conv.* adds a loss"),
        (with_fixed_batch, {}, "batch size is fixed"),
    ],
)
def test_what_cannot_be_computed_once_is_not(make, arguments, reason, data):
    model = lp.transfer_model(make(), 3, **arguments)
    assert re.search(reason, features.obstacle(model))
    model.fit(data[0], data[1], batch_size=10, verbose=0)
    with pytest.raises(ValueError, match=reason):
        lp.transfer_model(make(), 3, cache_features=True, **arguments)


def test_a_state_from_batch_to_batch_is_not_cached():
    inputs = keras.Input((5, 3))
    backbone = keras.Model(inputs, keras.layers.SimpleRNN(4)(inputs))
    backbone.layers[-1].stateful = True
    assert "keeps state" in features.obstacle(lp.transfer_model(backbone, 2))


@pytest.mark.parametrize("eager", [True, False])
def test_eager_models_are_cached_too(eager, data):
    def fit(model):
        model.run_eagerly = eager
        return model.fit(*data, epochs=2, shuffle=False, verbose=0)

    assert_same(twins(fit))


def test_labels_are_never_left_out(data):
    model = build()
    with pytest.raises(ValueError, match="need labels"):
        model.fit(data[0], sample_weight=np.ones(50), verbose=0)
    with pytest.raises(ValueError, match="need labels"):
        model.fit(*data, validation_data=(data[0],), verbose=0)


@pytest.mark.parametrize("memory", [10**6, 100])
def test_arrays_of_unequal_length_are_refused_as_in_keras(memory, data):
    x, y = data
    model = build(cache_memory=memory)
    for arguments in ({"x": x[:40], "y": y}, {"x": x, "y": y[:40]}):
        with pytest.raises(ValueError, match="cardinality is ambiguous"):
            model.fit(**arguments, verbose=0)
    with pytest.raises(ValueError, match="cardinality is ambiguous"):
        model.fit(x, y, validation_data=(x[:30], y), verbose=0)


def test_bfloat16_features_go_to_files_too(data):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build(cache_memory=100)
        model.fit(*data, epochs=2, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")


def mapped_and_deleted():
    with open("/proc/self/maps") as file:
        return sum("keras_lp_features" in line for line in file)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's /proc")
def test_the_space_of_files_is_given_back(data):
    model = build(cache_memory=100)
    for _ in range(2):
        model.fit(*data, epochs=2, verbose=0, validation_data=data)
    gc.collect()
    assert mapped_and_deleted() == 0


def test_nothing_is_traced_again_until_the_model_is_compiled(data):
    backbone, _ = counting_backbone()
    traces = []

    class Look(keras.layers.Layer):
        def call(self, x):
            traces.append(1)
            return x

    inputs = keras.Input(SHAPE)
    model = lp.transfer_model(keras.Model(inputs, Look()(backbone(inputs))), 3)
    model.fit(*data, epochs=2, verbose=0)
    traces.clear()
    for _ in range(3):
        model.fit(*data, epochs=2, verbose=0)
    assert not traces
    rates = []
    model.compile(keras.optimizers.SGD(0.5), model.loss)
    model.fit(*data, epochs=2, verbose=0)
    rates.append(float(model.optimizer.iterations))
    assert rates == [4.0]


def test_inputs_in_a_dict_or_list_are_cached_and_frozen_alike():
    """Fed as tensors: Keras then hands a structure of masks down."""
    inputs = {"p": keras.Input((4,), name="p"), "q": keras.Input((4,), name="q")}
    total = keras.layers.Dense(5)(keras.layers.Add()(list(inputs.values())))
    backbone = keras.Model(inputs, keras.layers.Dropout(0.5)(total))
    x = {name: tf.random.normal((30, 4)) for name in inputs}
    y = tf.constant(np.arange(30) % 2)
    made = []
    for cache in ("auto", False):
        keras.utils.set_random_seed(0)
        model = lp.transfer_model(backbone, 2, cache_features=cache)
        np.testing.assert_array_equal(model(x, training=True), model(x))
        made.append((model, model.fit(x, y, epochs=2, shuffle=False, verbose=0).history))
    assert_same(made)


def test_verbose_2_is_one_line(data, capsys):
    build().fit(*data, verbose=2)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [96, 224])
def test_few_examples_a_step_where_the_network_is_large(size):
    network = keras.applications.MobileNet(
        include_top=False, weights=None, alpha=0.25, input_shape=(size, size, 3)
    )
    model = lp.transfer_model(network, 2, input_shape=(28, 28, 1), image_size=size)
    assert features.feature_batch_size(model) == {96: 256, 224: 64}[size]


def infinite(data):
    return tf.data.Dataset.from_tensor_slices(data).batch(10).repeat()


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda m, d: m.fit(infinite(d), steps_per_epoch=2), r"may be infinite.*take\(n\)"),
        (
            lambda m, d: m.fit(infinite(d).filter(lambda *_: True), steps_per_epoch=2),
            "may be infinite",
        ),
        (lambda m, d: m.fit(iter([d])), "type list_iterator"),
        (
            lambda m, d: m.fit(tf.data.Dataset.from_tensor_slices(d).batch(10).take(0)),
            "an empty one",
        ),
    ],
)
def test_data_that_cannot_be_cached_are_refused(fit, message, data):
    with pytest.raises(ValueError, match=message):
        fit(build(cache_features=True), data)


def test_texts_of_several_lengths_are_refused_where_they_are_kept():
    backbone = keras.Sequential([keras.Input((None,)), keras.layers.Embedding(9, 4)])
    model = lp.transfer_model(backbone, 2, pooling=None, cache_features=True)
    batches = [(np.ones((2, n)), np.ones((2, n), "int32")) for n in (3, 4)]
    signature = (tf.TensorSpec((None, None)), tf.TensorSpec((None, None), "int32"))
    dataset = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    with pytest.raises(ValueError, match=r"the same shape.*\(3, 4\) and \(4, 4\)"):
        model.fit(dataset, verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_features": True, "augmentation": "light"}, "'augmentation' is random"),
        ({"cache_features": True, "trainable": 1}, "not wholly frozen"),
        ({"cache_features": "on"}, "cache_features='on'"),
        ({"cache_memory": 0}, "cache_memory=0"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.transfer_model(sequential(), 3, **arguments)
