"""Balanced tasks in plain `fit`: each method against an independent computation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.balancing.ways import METHODS, balancing_of
from tests.conftest import assert_same, snapshot

GRADIENT_METHODS = [name for name, method in METHODS.items() if method.uses_gradients]


@pytest.fixture
def examples(digits):
    x, y = digits
    digit = np.where(np.arange(200) % 3, y, -1)
    # Not in the order of the alphabet, which is that of the model's outputs.
    return x, {"odd": y % 2, "size": (y / 3).astype("float32"), "digit": digit}


@pytest.fixture
def build(mlp):
    def make(balancing, **options):
        keras.utils.set_random_seed(1)
        tasks = {"odd": 2, "size": lp.Regression(), "digit": 10}
        options = {"optimizer": keras.optimizers.SGD(0.1), **options}
        return lp.multitask_model(mlp((8,)), tasks, balancing=balancing, **options)

    return make


def gradients_of_tasks(model, x, y):
    """Losses and gradients of each task, by plain Keras losses over the labels present."""
    backbone = model.get_layer("mlp")
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses, gradients = [], []
    for name, labels in y.items():
        here = labels >= 0
        with tf.GradientTape() as tape:
            output = model(x)[name][here]
            if name == "size":
                std = np.asarray(model.get_layer("size").std)
                loss = tf.reduce_mean(((output[:, 0] - labels[here]) / std) ** 2)
            else:
                loss = crossentropy(labels[here], output)
        own = [*backbone.trainable_variables, *model.get_layer(name).trainable_variables]
        losses.append(float(loss))
        gradients.append([g.numpy() for g in tape.gradient(loss, [v.value for v in own])])
    return np.array(losses), gradients


def train(model, x, y, **options):
    return model.fit(x, y, batch_size=200, shuffle=False, verbose=0, **options)


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_shared_weights_follow_the_weighted_sum_and_heads_their_own_task(name, build, examples):
    x, y = examples
    model = build(name)
    model.get_layer("size").std.assign([1.3])  # so that `fit` leaves the targets alone
    before = {v.path: v.numpy() for v in model.trainable_variables}
    losses, gradients = gradients_of_tasks(model, x, y)
    flat = np.stack([np.concatenate([g.ravel() for g in own[:2]]) for own in gradients])
    gramian = (flat @ flat.T / np.mean(np.sum(flat**2, axis=1))).astype("float32")
    layer = METHODS[name].from_config(balancing_of(model).get_config())
    layer.build((None, 8))
    weights = np.asarray(layer.task_weights(losses.astype("float32"), gramian))
    history = train(model, x, y).history

    shared = sum(w * flat[i] for i, w in enumerate(weights))
    kernel, bias = model.get_layer("mlp").trainable_variables
    parts = np.split(shared, [kernel.numpy().size])
    for variable, gradient in zip((kernel, bias), parts, strict=True):
        moved = (before[variable.path] - variable.numpy()) / 0.1
        np.testing.assert_allclose(moved.ravel(), gradient, atol=2e-5)
    for own, task in zip(gradients, y, strict=True):
        for variable, gradient in zip(
            model.get_layer(task).trainable_variables, own[2:], strict=True
        ):
            moved = (before[variable.path] - variable.numpy()) / 0.1
            np.testing.assert_allclose(moved, gradient, atol=2e-5)
    for i, task in enumerate(y):
        assert history[f"{task}_weight"][0] == pytest.approx(weights[i], abs=1e-4)
        assert history[f"{task}_loss"][0] == pytest.approx(losses[i], abs=1e-5)
    cosines = flat @ flat.T
    lengths = np.sqrt(np.diag(cosines))
    cosines = (cosines / np.outer(lengths, lengths))[np.triu_indices(3, 1)]
    assert history["gradient_cosine"][0] == pytest.approx(cosines.mean(), abs=1e-5)


def test_uncertainty_equals_gradient_descent_on_the_log_variances(build, examples):
    """Plain Keras: the total loss of Kendall et al., with SGD on s at a rate of its own."""
    x, y = examples
    model, plain = build(lp.balancing.Uncertainty(learning_rate=0.05)), build("equal")
    for each in (model, plain):
        each.get_layer("size").std.assign([1.3])
    s, crossentropy = (
        np.zeros(3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for _ in range(3):
        train(model, x, y)
        log_variances = tf.Variable(s, dtype=tf.float32)
        with tf.GradientTape() as tape:
            outputs = plain(x)
            here = y["digit"] >= 0
            losses = [
                crossentropy(y["odd"], outputs["odd"]),
                0.5 * tf.reduce_mean(((outputs["size"][:, 0] - y["size"]) / 1.3) ** 2),
                crossentropy(y["digit"][here], outputs["digit"][here]),
            ]
            total = tf.reduce_sum(tf.exp(-log_variances) * losses + log_variances / 2)
        variables = [v.value for v in plain.trainable_variables]
        *gradients, slope = tape.gradient(total, [*variables, log_variances])
        for variable, gradient in zip(plain.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.1 * gradient)
        s = s - 0.05 * slope.numpy()
    np.testing.assert_allclose(balancing_of(model).log_variances, s, atol=1e-5)
    for a, b in zip(model.trainable_variables, plain.trainable_variables, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_dwa_follows_its_formula(build, examples):
    x, y = examples
    model = build("dwa")
    history = train(model, x, y, epochs=4).history
    losses = np.array([history[f"{task}_loss"] for task in y])
    weights = np.array([history[f"{task}_weight"] for task in y])
    np.testing.assert_allclose(weights[:, :2], 1, atol=1e-6)
    for epoch in (2, 3):
        powers = np.exp(losses[:, epoch - 1] / losses[:, epoch - 2] / 2.0)
        np.testing.assert_allclose(weights[:, epoch], 3 * powers / powers.sum(), rtol=1e-5)


def test_gradnorm_follows_the_gradient_of_its_own_loss(build, examples):
    """L = sum of |w_i |g_i| - target_i|, the targets held constant, by automatic gradients."""
    x, y = examples
    model = build(lp.balancing.GradNorm(alpha=0.5, learning_rate=0.1))
    model.get_layer("size").std.assign([1.3])
    expected, first = np.ones(3), None
    for _ in range(3):
        losses, gradients = gradients_of_tasks(model, x, y)
        first = losses if first is None else first
        sizes = np.array([np.sqrt(sum((g**2).sum() for g in own[:2])) for own in gradients])
        sizes = sizes / np.sqrt(np.mean(sizes**2))
        weights = tf.Variable(expected, dtype=tf.float64)
        with tf.GradientTape() as tape:
            norms = weights * sizes
            ratios = (losses / first) / np.mean(losses / first)
            target = tf.stop_gradient(tf.reduce_mean(norms) * ratios**0.5)
            gap = tf.reduce_sum(tf.abs(norms - target))
        moved = expected - 0.1 * tape.gradient(gap, weights).numpy()
        expected = 3 * moved / moved.sum()
        train(model, x, y)
        np.testing.assert_allclose(balancing_of(model).weights_now, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "gradnorm"])
def test_a_task_absent_from_training_keeps_its_state(name, build, examples):
    x, y = examples
    model = build(name)
    train(model, x, y, epochs=3)
    states = [np.array(v) for v in balancing_of(model).weights]
    train(model, x, {task: y[task] for task in ("odd", "digit")}, epochs=2)
    for before, after in zip(states, balancing_of(model).weights, strict=True):
        if name == "dwa" and after is balancing_of(model).weights_now:
            continue  # the shares of one sum: the others' move it
        assert before[1] == np.asarray(after)[1]
    assert any(
        (before[[0, 2]] != np.asarray(after)[[0, 2]]).any()
        for before, after in zip(states, balancing_of(model).weights, strict=True)
    )


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "cagrad", "imtl_g"])
def test_a_task_absent_from_a_batch_leaves_the_others_as_they_would_be(name, build, examples):
    x, y = examples
    two = {task: y[task] for task in ("odd", "digit")}
    model = build(name)
    keras.utils.set_random_seed(1)
    alone = lp.multitask_model(
        keras.models.clone_model(model.get_layer("mlp")),
        {"odd": 2, "digit": 10},
        balancing=name,
        optimizer=keras.optimizers.SGD(0.1),
    )
    for task in ("mlp", "digit", "odd"):
        alone.layers[[layer.name for layer in alone.layers].index(task)].set_weights(
            model.get_layer(task).get_weights()
        )
    logs = train(model, x, two).history
    train(alone, x, two)
    for layer in ("mlp", "digit", "odd"):
        for a, b in zip(
            model.get_layer(layer).get_weights(), alone.get_layer(layer).get_weights(), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert logs["size_weight"][0] == 0


def test_fixed_weights_are_those_of_the_losses(build, examples):
    x, y = examples
    weights = {"digit": 2.0, "odd": 0.5, "size": 0.0}
    model, plain = build(weights), build("equal")
    losses, gradients = gradients_of_tasks(plain, x, y)
    size = model.get_layer("size").get_weights()
    expected = model.get_layer("mlp").get_weights()[0] - 0.1 * sum(
        weights[task] * own[0] for task, own in zip(y, gradients, strict=True)
    )
    history = train(model, x, y).history
    np.testing.assert_allclose(model.get_layer("mlp").get_weights()[0], expected, atol=1e-6)
    assert_same(size[:2], model.get_layer("size").get_weights()[:2])  # kernel and bias
    assert history["loss"][0] == pytest.approx(0.5 * losses[0] + 2 * losses[2], rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_monitored_is_the_plain_sum_of_the_losses_also_in_xla(name, build, examples):
    x, y = examples
    model = build(name)
    model.jit_compile = True  # what Keras does by itself on a GPU
    logs = train(model, x, y, epochs=3, validation_data=(x, y)).history
    for prefix in ("", "val_"):
        total = np.sum([logs[f"{prefix}{task}_loss"] for task in y], axis=0)
        np.testing.assert_allclose(logs[f"{prefix}loss"], total, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_goes_on_bit_equal(name, build, examples, tmp_path):
    x, y = examples
    model = build(name, optimizer="adam")
    train(model, x, y, epochs=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(snapshot(model), snapshot(loaded))
    if name == "pcgrad":  # Keras does not restore the state of random generators
        for each in (model, loaded):
            balancing_of(each)._random.state.assign([0, 0])
    for each in (model, loaded):
        train(each, x, y)
    assert_same(snapshot(model), snapshot(loaded))


@pytest.mark.parametrize("name", ["uncertainty", "cagrad"])
def test_mixed_precision_gives_nearly_the_same(name, build, examples):
    x, y = examples
    plain = build(name)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        mixed = build(name)
    finally:
        keras.config.set_dtype_policy("float32")
    mixed.set_weights(plain.get_weights())
    for each in (plain, mixed):
        train(each, x, y, epochs=3)
    assert isinstance(mixed.optimizer, keras.optimizers.LossScaleOptimizer)
    for a, b in zip(plain.trainable_variables, mixed.trainable_variables, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3)


def test_penalties_are_added_unweighted(digits):
    x, y = digits
    backbone = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.1))]
    )
    tasks = {"a": 10, "b": lp.Classification(10, weight=0.0)}
    model = lp.multitask_model(
        backbone, tasks, balancing="mgda", optimizer="sgd", learning_rate=0.01
    )
    backbone = model.get_layer(backbone.name)
    kernel = backbone.layers[0].kernel.numpy()
    model.get_layer("a").kernel.assign(np.zeros((4, 10)))  # no gradient from the tasks
    history = train(model, x, {"a": y, "b": y}).history
    np.testing.assert_allclose(backbone.layers[0].kernel, kernel * (1 - 0.01 * 0.2), rtol=1e-5)
    penalty = 0.1 * (kernel**2).sum()
    assert history["loss"][0] == pytest.approx(history["a_loss"][0] + penalty, rel=1e-4)


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm"])
def test_a_task_of_weight_zero_keeps_its_state(name, mlp, digits):
    x, y = digits
    tasks = {"a": 10, "b": lp.Classification(10, weight=0.0)}
    model = lp.multitask_model(mlp(), tasks, balancing=name)
    train(model, x, {"a": y, "b": y}, epochs=3)
    state = np.asarray(balancing_of(model).weights[0])
    start = 0.0 if name == "uncertainty" else 1.0
    assert state[1] == start


def test_gradients_of_embeddings_are_balanced_too():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 50, (40, 6))
    y = {"a": x[:, 0] % 2, "b": x[:, 1] % 2}
    backbone = keras.Sequential(
        [keras.Input((6,), dtype="int32"), keras.layers.Embedding(50, 4), keras.layers.Flatten()]
    )
    model = lp.multitask_model(
        backbone, {"a": 2, "b": 2}, pooling=None, balancing="pcgrad", learning_rate=0.05
    )
    history = model.fit(x, y, epochs=30, verbose=0).history
    assert history["a_accuracy"][-1] > 0.9
    assert history["b_accuracy"][-1] > 0.9


def test_early_stopping_on_one_task_works(build, examples):
    stop = keras.callbacks.EarlyStopping("val_odd_accuracy", mode="max", patience=1)
    history = train(
        build("uncertainty", optimizer=keras.optimizers.SGD(0.0)),
        *examples,
        epochs=9,
        validation_data=examples,
        callbacks=[stop],
    )
    assert len(history.epoch) == 2


def test_loss_balancing_works_with_cached_features(build, examples):
    history = train(build("dwa", trainable="head"), *examples, epochs=4).history
    assert history["digit_weight"][3] != history["digit_weight"][0] == pytest.approx(1)


@keras.saving.register_keras_serializable("test_balancing")
class Largest(lp.Balancing):
    """Follows the task with the largest gradient."""

    uses_gradients = True

    def task_weights(self, losses, gramian):
        squares = keras.ops.diagonal(gramian)
        return keras.ops.cast(squares == keras.ops.max(squares), "float32")


def test_a_method_of_ones_own_trains_saves_and_loads(build, examples, tmp_path):
    x, y = examples
    model = build(Largest())
    history = train(model, x, y).history
    assert sorted(history[f"{task}_weight"][0] for task in y) == [0, 0, 1]
    model.save(tmp_path / "model.keras")
    assert isinstance(balancing_of(keras.models.load_model(tmp_path / "model.keras")), Largest)


def test_settings_of_a_method_survive_and_models_do_not_share_its_state(build, tmp_path):
    method = lp.balancing.CAGrad(c=0.3)
    first, second = build(method), build(method)
    assert balancing_of(first) is not balancing_of(second)
    first.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert balancing_of(loaded).c == 0.3
    assert balancing_of(loaded).tasks == balancing_of(first).tasks


def test_fine_tuning_keeps_the_balancing(build, examples):
    model = lp.finetune_model(build("mgda"), layer_decay=0.5)
    assert "gradient_cosine" in train(model, *examples).history


@pytest.mark.parametrize(
    ("balancing", "error", "message"),
    [
        ("cagra", ValueError, "Did you mean 'cagrad'"),
        ("mean", ValueError, "'equal', 'sum', 'uncertainty'"),
        ({"digit": 1.0}, ValueError, "a weight for each of the tasks"),
        ({"digit": 1.0, "odd": -1.0, "size": 1.0}, ValueError, "a number of 0 or more"),
        ({"digit": 1.0, "odd": "2", "size": 1.0}, ValueError, "Each weight of `balancing`"),
        (3, TypeError, "a name, a dict of weights by task"),
    ],
)
def test_wrong_balancing_is_refused(build, balancing, error, message):
    with pytest.raises(error, match=message):
        build(balancing)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lp.balancing.CAGrad(c=-1), "`c` must be a number of 0 or more"),
        (lambda: lp.balancing.GradNorm(alpha=-1), "`alpha` must be a number of 0 or more"),
        (lambda: lp.balancing.DWA(temperature=0), "`temperature` must be a number above 0"),
        (lambda: lp.balancing.Uncertainty(learning_rate=0), "`learning_rate` must be"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradient_balancing_of_a_frozen_backbone_is_refused(build, examples):
    with pytest.raises(ValueError, match="trainable shared parameters"):
        build("mgda", trainable="head")
    model = lp.finetune_model(build("mgda"), trainable="head")
    with pytest.raises(ValueError, match="trainable shared parameters"):
        train(model, *examples)


def test_losses_that_are_not_the_tasks_own_are_refused(build, examples):
    model = build("dwa")
    model.compile("sgd", loss=dict.fromkeys(examples[1], "mse"))
    with pytest.raises(ValueError, match="the tasks' own losses"):
        train(model, *examples)


def test_federation_refuses_a_balanced_model(build):
    with pytest.raises(ValueError, match=r"fixed loss weights.*by MGDA"):
        lp.FederatedAveraging(build("mgda"))
