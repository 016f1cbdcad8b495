"""Layer rates: measured from one step, against plain Keras and NumPy."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_lp as lp
from tests.conftest import assert_same, snapshot, with_random_heads


def steps(model, digits, **kwargs):
    """By how much one full-batch step moves each trainable variable."""
    before = [v.numpy().copy() for v in model.trainable_variables]
    model.fit(*digits, batch_size=200, epochs=1, verbose=0, **kwargs)
    return [v.numpy() - old for v, old in zip(model.trainable_variables, before, strict=True)]


def sgd_twin(model, digits):
    """The gradients of one full batch, by plain Keras SGD of rate 1 on a clone."""
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    twin.compile(keras.optimizers.SGD(1.0), model.loss)
    return [-step for step in steps(twin, digits)]


def test_one_sgd_step_shows_the_promised_ratios(mlp, digits):
    model = with_random_heads(lp.transfer_model(mlp((12, 10, 8)), 10))
    model = lp.finetune_model(
        model, optimizer="sgd", learning_rate=0.1, layer_decay=0.5, weight_decay=None
    )
    gradients = sgd_twin(model, digits)
    moved = steps(model, digits)
    ratios = [
        -float((step * g).sum() / (g * g).sum()) for step, g in zip(moved, gradients, strict=True)
    ]
    # kernel and bias of block0, block1, block2 and the head
    assert ratios == pytest.approx(np.repeat([0.0125, 0.025, 0.05, 0.1], 2).tolist(), rel=1e-4)


def test_adamw_equals_a_keras_adamw_for_each_layer(mlp, digits):
    """Three steps; decay is at the layer's rate, and none for biases."""
    model = lp.finetune_model(
        lp.transfer_model(mlp((12, 8)), 10), learning_rate=1e-2, layer_decay=0.3, weight_decay=0.5
    )
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    rates = [1e-2 * 0.3**2, 1e-2 * 0.3, 1e-2]
    layers = [*twin.get_layer("mlp").layers, twin.get_layer("predictions")]
    optimizers = []
    for layer, rate in zip(layers, rates, strict=True):
        optimizers.append((keras.optimizers.AdamW(rate, weight_decay=0.5), [layer.kernel]))
        optimizers.append((keras.optimizers.Adam(rate), [layer.bias]))
    import tensorflow as tf

    x, y = digits
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for _ in range(3):
        with tf.GradientTape() as tape:
            value = loss(y, twin(x))
        gradients = tape.gradient(value, [v for _, group in optimizers for v in group])
        for (optimizer, variables), gradient in zip(optimizers, gradients, strict=True):
            optimizer.apply([gradient], variables)
    model.fit(x, y, batch_size=200, epochs=3, verbose=0)
    for a, b in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_one_global_norm_clips_all_layers(mlp, digits):
    model = lp.finetune_model(
        lp.transfer_model(mlp((12, 8)), 10),
        optimizer=keras.optimizers.SGD(1.0, global_clipnorm=0.1),
        layer_decay=0.5,
    )
    gradients = sgd_twin(model, digits)
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    assert norm > 0.1
    rates = np.repeat([0.25, 0.5, 1.0], 2)
    for step, g, rate in zip(steps(model, digits), gradients, rates, strict=True):
        np.testing.assert_allclose(step, -rate * g * 0.1 / norm, atol=1e-7)


@pytest.mark.parametrize("how", ["schedule", "callback"])
def test_schedules_and_callbacks_keep_the_ratios(mlp, digits, how):
    """At half the rate every layer moves half as far."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5, staircase=True)
    rate = schedule if how == "schedule" else 0.1
    model = lp.finetune_model(
        lp.transfer_model(mlp((12,)), 10),
        optimizer="sgd", learning_rate=rate, layer_decay=0.5, weight_decay=None,
    )  # fmt: skip
    steps(model, digits)
    gradients = sgd_twin(model, digits)
    callbacks = [keras.callbacks.LearningRateScheduler(lambda _: 0.05)] if how == "callback" else []
    rates = np.repeat([0.025, 0.05], 2)
    for step, g, rate in zip(
        steps(model, digits, callbacks=callbacks), gradients, rates, strict=True
    ):
        np.testing.assert_allclose(step, -rate * g, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "lion"])
def test_decay_1_equals_the_plain_optimizer(mlp, digits, name):
    model = lp.finetune_model(
        lp.transfer_model(mlp((12,)), 10),
        optimizer=name, learning_rate=1e-2, layer_decay=1.0, weight_decay=None,
    )  # fmt: skip
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    config = {"learning_rate": 1e-2, **({"weight_decay": 0.0} if name == "adamw" else {})}
    plain.compile(
        keras.optimizers.get({"class_name": name, "config": config}),
        lp.Classification(10).make_loss(),
    )
    for each in (model, plain):
        each.fit(*digits, batch_size=50, shuffle=False, epochs=2, verbose=0)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_mixed_precision_keeps_the_ratios(digits):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(12, "relu")])
        model = lp.finetune_model(
            lp.transfer_model(backbone, 10),
            optimizer="sgd", learning_rate=0.1, layer_decay=0.5, weight_decay=None,
        )  # fmt: skip
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        gradients = sgd_twin(model, digits)
        rates = np.repeat([0.05, 0.1], 2)
        for step, g, rate in zip(steps(model, digits), gradients, rates, strict=True):
            np.testing.assert_allclose(step, -rate * g, atol=1e-6)
    finally:
        keras.config.set_dtype_policy("float32")


def test_any_compiled_keras_model_is_taken_with_its_loss_and_metrics(digits):
    inputs = keras.Input((64,))
    x = keras.layers.Dense(8, "relu", name="first")(inputs)
    x = keras.layers.Dense(8, "relu", name="second")(x)
    x = keras.layers.Dense(10, name="logits")(x)
    model = keras.Model(inputs, keras.layers.Softmax()(x))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    assert lp.finetune_model(model, layer_decay=0.5) is model
    assert model.optimizer.multipliers == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    assert set(model.fit(*digits, verbose=0).history) == {"loss", "accuracy"}


def test_each_output_of_a_keras_model_has_a_head(digits):
    inputs = keras.Input((64,))
    x = keras.layers.Dense(8, name="shared")(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(2)(x), keras.layers.Dense(3)(x)])
    model.compile("sgd", ["mse", "mse"])
    lp.finetune_model(model, layer_decay=0.5)
    assert model.optimizer.multipliers == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]


def test_heads_behind_a_shared_activation_are_all_found():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(8)(inputs)
    softmax = keras.layers.Softmax()
    model = keras.Model(inputs, [softmax(keras.layers.Dense(2)(x)) for _ in range(2)])
    model.compile("sgd", ["mse", "mse"])
    assert lp.finetune_model(model).optimizer.multipliers == [0.7, 0.7, 1.0, 1.0, 1.0, 1.0]


def test_the_head_of_a_wrapped_model_is_found_inside(convnet, digits):
    """Rescaling or augmentation in front of a model is common."""
    inner = keras.Sequential(
        [convnet(), keras.layers.Flatten(), keras.layers.Dense(10, name="logits")]
    )
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Rescaling(1.0), inner])
    model.compile("sgd", lp.Classification(10).make_loss())
    lp.finetune_model(model, layer_decay=0.5, learning_rate=1e-2)
    assert model.optimizer.multipliers == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    norm = inner.layers[0].get_layer("block1_bn")
    before = norm.moving_mean.numpy()
    model.fit(digits[0].reshape(-1, 8, 8, 1), digits[1], verbose=0)
    np.testing.assert_array_equal(before, norm.moving_mean.numpy())


def test_our_model_in_a_plain_one_is_thawed(mlp, digits):
    model = keras.Sequential([lp.transfer_model(mlp((12, 8)), 10), keras.layers.Softmax()])
    model.compile("sgd", "sparse_categorical_crossentropy")
    lp.finetune_model(model, layer_decay=0.5)
    assert model.optimizer.multipliers == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


def test_a_frozen_head_of_a_plain_model_is_thawed():
    frozen = keras.layers.Dense(3, trainable=False)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), frozen])
    model.compile("sgd", "mse")
    assert lp.finetune_model(model).optimizer.multipliers == [0.7, 0.7, 1.0, 1.0]


@pytest.mark.parametrize("arguments", [{"trainable": ["typo"]}, {"optimizer": "ftrl"}])
def test_a_refused_call_leaves_the_model_as_it_was(mlp, digits, arguments):
    model = lp.transfer_model(mlp(), 10)
    with pytest.raises(ValueError, match=r"typo|Ftrl"):
        lp.finetune_model(model, **arguments)
    model.fit(*digits, verbose=0)
    assert len(model.trainable_variables) == 2


def test_weights_of_a_backbone_outside_its_layers_are_at_the_bottom():
    @keras.saving.register_keras_serializable("tests")
    class Own(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.low, self.high = keras.layers.Dense(4), keras.layers.Dense(4)
            self.token = self.add_weight(shape=(4,), name="token")

        def call(self, x):
            return self.high(self.low(x) + self.token)

    model = lp.transfer_model(Own(), 3, input_shape=(4,))
    lp.finetune_model(model, layer_decay=0.5)
    rates = dict(zip([v.path for v in model.trainable_variables], model.optimizer.multipliers,
                     strict=True))  # fmt: skip
    (token,) = [rate for path, rate in rates.items() if path.endswith("token")]
    assert token == 0.25


def test_biases_of_rank_2_do_not_decay(digits):
    x = keras.Input((4, 8))
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    model = lp.finetune_model(
        lp.transfer_model(keras.Model(x, attention(x, x)), 3),
        learning_rate=0.1, weight_decay=1.0, optimizer="adamw", layer_decay=1.0,
    )  # fmt: skip
    bias = attention.value_dense.bias
    key_bias = attention.key_dense.bias  # its gradient is 0: only a decay would move it
    key_bias.assign(np.ones(key_bias.shape))
    assert bias.shape == (2, 4)
    model.fit(np.zeros((4, 4, 8), "float32"), np.zeros(4, int), verbose=0)
    np.testing.assert_allclose(key_bias, 1.0, atol=1e-3)


def test_a_backbone_with_a_task_gets_a_head(convnet):
    model = lp.finetune_model(convnet(), ["a", "b"])
    assert model.output_shape == (None, 2)
    assert model.get_layer("pooling")


def test_frozen_blocks_keep_the_rates_of_those_above(mlp):
    model = lp.finetune_model(mlp((12, 10, 8)), 10, trainable=1, layer_decay=0.5)
    assert model.optimizer.multipliers == [0.5, 0.5, 1.0, 1.0]


TRAIN_ON = """
import sys, numpy as np, keras, keras_lp
model = keras.models.load_model(sys.argv[1])
data = np.load(sys.argv[2])
model.fit(data["x"], data["y"], batch_size=50, shuffle=False, epochs=2, verbose=0)
np.savez(sys.argv[3], *[v.numpy() for v in [*model.weights, *model.optimizer.variables]])
"""


@keras.saving.register_keras_serializable("tests")
class Unit(keras.layers.Layer):
    """A layer of layers, whose inner flags Keras forgets."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = keras.layers.Dense(units)
        self.norm = keras.layers.BatchNormalization()

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((*shape[:-1], self.units))

    def call(self, x):
        return self.norm(self.dense(x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@pytest.mark.parametrize("trainable", ["head", 1, "all"])
@pytest.mark.parametrize("finetuned", [False, True])
def test_flags_inside_layers_survive_saving(digits, tmp_path, trainable, finetuned):
    layers = [Unit(12, name="low"), keras.layers.ReLU(), Unit(8, name="high")]
    model = lp.transfer_model(keras.Sequential([keras.Input((64,)), *layers]), 10,
                              trainable=trainable)  # fmt: skip
    if finetuned:
        model = lp.finetune_model(model, trainable=trainable, learning_rate=1e-2)
    model.fit(*digits, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(*digits, shuffle=False, epochs=2, verbose=0)
    assert_same(snapshot(model), snapshot(loaded))


@pytest.mark.parametrize("kind", ["finetune", "transfer", "multitask"])
def test_a_model_loaded_in_a_fresh_process_goes_on_to_the_same_weights(kind, mlp, digits, tmp_path):
    x, y = digits
    backbone = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(12, name="a"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(12, "relu", name="b"),
        ]
    )
    if kind == "multitask":
        model = lp.multitask_model(backbone, {"predictions": 10})
    else:
        model = lp.transfer_model(backbone, 10, trainable=["b"])
    if kind == "finetune":
        model = lp.finetune_model(model, learning_rate=1e-2, trainable=2)
    model.fit(x, {"predictions": y} if kind == "multitask" else y, epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=y)
    script = TRAIN_ON
    if kind == "multitask":
        script = script.replace('data["y"]', '{"predictions": data["y"]}')
    files = [tmp_path / name for name in ("model.keras", "data.npz", "o.npz")]
    subprocess.run([sys.executable, "-c", script, *files], check=True)
    model.fit(
        x, {"predictions": y} if kind == "multitask" else y,
        batch_size=50, shuffle=False, epochs=2, verbose=0,
    )  # fmt: skip
    expected = [*snapshot(model), *(v.numpy() for v in model.optimizer.variables)]
    assert_same(list(np.load(tmp_path / "o.npz").values()), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer_decay": 0}, ValueError, "layer_decay=0"),
        ({"layer_decay": 1.5}, ValueError, "at most 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate=-1.0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"optimizer": "adamv"}, ValueError, "Did you mean 'adam"),
        ({"optimizer": "ftrl"}, ValueError, r"\['SGD', 'Adam', .* type Ftrl"),
        ({"optimizer": 3}, TypeError, "optimizer=3"),
    ],
)
def test_wrong_arguments_are_refused(mlp, arguments, error, message):
    with pytest.raises(error, match=message):
        lp.finetune_model(lp.transfer_model(mlp(), 10), **arguments)


def test_models_without_a_loss_or_weights_are_refused(mlp):
    with pytest.raises(ValueError, match=r"finetune_model\(model, task\)"):
        lp.finetune_model(mlp())
    with pytest.raises(TypeError, match=r"finetune_model\(backbone, task\)"):
        lp.finetune_model("MobileNetV2")
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    unbuilt.compile("sgd", "mse")
    with pytest.raises(ValueError, match="not built"):
        lp.finetune_model(unbuilt)


def test_rates_for_other_variables_are_refused(mlp):
    model = lp.finetune_model(lp.transfer_model(mlp(), 10))
    again = type(model.optimizer).from_config(model.optimizer.get_config())
    with pytest.raises(ValueError, match="2 variables for 4 rates"):
        again.build(model.trainable_variables[:2])


def test_the_chain_of_builders_shares_one_backbone(mlp, digits):
    backbone = mlp()
    model = lp.finetune_model(lp.transfer_model(backbone, 10), learning_rate=1e-2)
    before = backbone.get_weights()[0].copy()
    model.fit(*digits, verbose=0)
    assert np.abs(backbone.get_weights()[0] - before).max() > 0


def test_the_scale_of_features_is_folded_where_they_train(mlp, digits):
    """The gradients of what is below the head are those of plain Keras."""
    x, y = digits
    model = lp.transfer_model(mlp(), 10)
    model.fit(x, y, verbose=0)
    head, before = model.get_layer("predictions"), model.predict(x, verbose=0)
    raw = head.raw_weights()
    lp.finetune_model(model, trainable="head")
    assert (np.asarray(head.input_scale) != 1).any()
    lp.finetune_model(model)
    assert (np.asarray(head.input_scale) == 1).all()
    np.testing.assert_allclose(model.predict(x, verbose=0), before, atol=1e-4)
    for ours, expected in zip((head.kernel, head.bias), raw, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
