"""Files that train in the LiteRT runtime, compared with Keras."""

import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.tflite.device import device as device_module
from tests.conftest import assert_same, snapshot

pytest.importorskip("ai_edge_litert.interpreter")

layers = keras.layers
BATCH = 16


def pictures(digits, size=8):
    x, y = digits
    return x.reshape(-1, size, size, 1), y


def compare(model, trainer, x, y, steps, loss_atol=1e-5, weights_atol=1e-4):
    """Trains both on the same batches; the model is compiled with the file's optimizer."""
    rng = np.random.default_rng(0)
    train = trainer._run["train"]
    mask = np.ones(BATCH, "float32")
    for _ in range(steps):
        rows = rng.integers(len(x), size=BATCH)
        model.reset_metrics()
        logs = model.train_on_batch(x[rows], y[rows], return_dict=True)
        loss = float(train(x=x[rows], y=y[rows], mask=mask)["loss"])
        np.testing.assert_allclose(loss, logs["loss"], atol=loss_atol, rtol=0)
    for name, value in trainer.get_weights().items():
        if name != "version":
            ours = model.weights[position(name)]
            np.testing.assert_allclose(value, ours, atol=weights_atol, rtol=0)


def position(name):
    """The position in `model.weights` of an exchanged weight, `w<position>_<layer>_<weight>`."""
    return int(name[1:].split("_")[0])


def dense():
    return keras.Sequential(
        [keras.Input((64,)), layers.Dense(16, "relu"), layers.Dense(10, name="head")]
    )


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.DepthwiseConv2D(3, padding="same", activation="relu6"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(10, name="head"),
        ]
    )


def compiled(model, optimizer="sgd"):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    return model


@pytest.mark.parametrize(("build", "shape"), [(dense, (64,)), (convolutional, (8, 8, 1))])
def test_400_steps_equal_keras(build, shape, digits, tmp_path):
    """The pictures are real digits, with blank areas."""
    model = compiled(build(), keras.optimizers.SGD(0.05))
    lp.export_trainable_tflite(model, tmp_path / "m.tflite", trainable="all", learning_rate=0.05)
    x, y = digits[0].reshape(-1, *shape), digits[1]
    compare(model, lp.DeviceTrainer(tmp_path / "m.tflite"), x, y, 400)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_other_optimizers_equal_keras(optimizer, digits, tmp_path):
    made = {
        "momentum": keras.optimizers.SGD(0.02, momentum=0.9),
        "adam": keras.optimizers.Adam(0.02),
    }
    model = compiled(dense(), made[optimizer])
    lp.export_trainable_tflite(
        model, tmp_path / "m.tflite", trainable="all", optimizer=optimizer, learning_rate=0.02
    )
    compare(model, lp.DeviceTrainer(tmp_path / "m.tflite"), *digits, 100, loss_atol=1e-4)


def mobilenet(trainable, rate):
    """MobileNet 0.25 with random weights, whose features vary, and the optimizer SGD."""
    model = lp.transfer_model(
        "MobileNet",
        10,
        weights=None,
        input_shape=(64, 64, 3),
        backbone_kwargs={"alpha": 0.25},
        trainable="all",
        pooling="avg",
    )
    normalizations = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    for layer in normalizations:
        layer.momentum = 0.0
    model(np.random.default_rng(0).uniform(0, 255, (64, 64, 64, 3)), training=True)
    # All learn at one rate; BatchNormalization stands still.
    return lp.finetune_model(
        model, trainable=trainable, layer_decay=1.0, optimizer=keras.optimizers.SGD(rate)
    )


def mobilenet_examples():
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 255, (64, 64, 64, 3)).astype("float32")
    x[:, :20] = 0
    return x, rng.integers(0, 10, 64).astype("int32")


@pytest.mark.slow
def test_the_head_of_mobilenet_equals_keras(tmp_path):
    model = mobilenet("head", 0.01)
    lp.export_trainable_tflite(model, tmp_path / "m.tflite", trainable="head")
    compare(model, lp.DeviceTrainer(tmp_path / "m.tflite"), *mobilenet_examples(), 400)


@pytest.mark.slow
def test_the_whole_of_mobilenet_equals_keras(tmp_path):
    """20 steps, each from Keras's weights: free, two such nets drift apart from rounding alone.

    At the kinks of 27 relu6 a rounding decides whether a gradient passes, so a step of the lowest
    weights agrees less well than their values.
    """
    rate = 1e-4
    model = mobilenet("all", rate)
    before = snapshot(model)
    report = lp.export_trainable_tflite(
        model, tmp_path / "m.tflite", trainable="all", learning_rate=rate
    )
    assert_same(before, snapshot(model))
    assert len(report.carried) == 54  # mean and variance of 27 layers
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    x, y = mobilenet_examples()
    for step in range(20):
        start = snapshot(model)
        weights = trainer.get_weights()
        for name in weights.keys() - {"version"}:
            weights[name] = start[position(name)]
        trainer.set_weights(weights)
        rows = np.random.default_rng(step).integers(len(x), size=BATCH)
        model.reset_metrics()
        expected = model.train_on_batch(x[rows], y[rows], return_dict=True)["loss"]
        loss = trainer._run["train"](x=x[rows], y=y[rows], mask=np.ones(BATCH, "float32"))["loss"]
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
        after, ours = snapshot(model), trainer.get_weights()
        for name in report.trained:
            i = position(name)
            moved = np.linalg.norm(after[i] - start[i])
            assert moved > 0
            np.testing.assert_allclose(ours[name], after[i], atol=1e-4, rtol=0)
            assert np.linalg.norm(ours[name] - after[i]) < 5e-2 * moved


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    """A model with Dropout and BatchNormalization that train in Keras, its file and report."""
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(6, 3, name="block1_conv"),
            layers.BatchNormalization(name="block1_bn"),
            layers.Activation("gelu", name="block1_act"),
            layers.Conv2D(8, 3, activation="relu", name="block2_conv"),
        ]
    )
    model = lp.transfer_model(
        backbone,
        [str(i) for i in range(10)],
        trainable="all",
        pretrained=False,
        dropout=0.5,
        pooling="avg",
    )
    path = tmp_path_factory.mktemp("device") / "m.tflite"
    flags = [layer.trainable for layer in model._flatten_layers()]
    weights = snapshot(model)
    report = lp.export_trainable_tflite(model, path, trainable="head", learning_rate=0.5)
    assert [layer.trainable for layer in model._flatten_layers()] == flags
    assert_same(weights, snapshot(model))
    return model, path, report


def test_the_report_says_what_trains_and_what_is_off(transferred):
    _, path, report = transferred
    assert report.size == path.stat().st_size
    assert report.trained == {"w8_predictions_kernel": (8, 10), "w9_predictions_bias": (10,)}
    assert report.switched_off == ("predictions_dropout",)
    assert report.held_still == ("block1_bn",)
    assert report.check.step_difference < 1e-5
    assert "off on the device: predictions_dropout" in str(report)
    assert "trains 90 parameters in 2 weights, sgd with learning rate 0.5, batch size 16" in str(
        report
    )


def test_training_on_features_equals_training_on_examples(transferred, digits):
    _, path, report = transferred
    assert {"features", "train_features"} <= set(report.signatures)
    x, y = pictures(digits)
    by_features, by_examples = lp.DeviceTrainer(path), lp.DeviceTrainer(path)
    for name in ("features", "train_features"):
        del by_examples._run[name]
    losses = [trainer.fit(x[:50], y[:50], epochs=3) for trainer in (by_features, by_examples)]
    np.testing.assert_allclose(*losses, atol=1e-5)
    for name, value in by_features.get_weights().items():
        np.testing.assert_allclose(by_examples.get_weights()[name], value, atol=1e-5)


def test_fit_learns_and_evaluate_and_predict_equal_keras(transferred, digits):
    model, path, _ = transferred
    trainer = lp.DeviceTrainer(path)
    x, y = pictures(digits)
    losses = trainer.fit(x[:100], y[:100], epochs=10)
    assert losses[-1] < losses[0]
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    for name, value in trainer.get_weights().items():
        if name != "version":
            twin.weights[position(name)].assign(value)
    logits = twin.predict(x[100:], verbose=0)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(trainer.predict(x[100:]), expected, atol=1e-5)
    results = trainer.evaluate(x[100:], y[100:])
    rows = expected[np.arange(100), y[100:]]
    assert results["loss"] == pytest.approx(-np.log(rows).mean(), abs=1e-4)
    assert results["accuracy"] == pytest.approx((expected.argmax(-1) == y[100:]).mean(), abs=1e-6)


def test_examples_beyond_the_mask_do_not_count(transferred, digits):
    _, path, _ = transferred
    x, y = pictures(digits)
    trainers = [lp.DeviceTrainer(path) for _ in range(2)]
    mask = (np.arange(BATCH) < 5).astype("float32")
    for trainer, other in zip(trainers, (0.0, 9e3), strict=True):
        batch, labels = x[:BATCH].copy(), y[:BATCH].copy()
        batch[5:], labels[5:] = other, 0
        trainer._run["train"](x=batch, y=labels, mask=mask)
    a, b = (trainer.get_weights() for trainer in trainers)
    assert_same([*a.values()], [*b.values()])


ACCURACY = keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)


@pytest.mark.parametrize(
    "task",
    [lp.MultiLabel(3, metrics=[ACCURACY]), lp.Regression(2, mean=5, std=[2, 4])],
)
def test_other_tasks_with_missing_labels_equal_keras(task, mlp, tmp_path):
    model = lp.transfer_model(
        mlp((8,)), task, trainable="all", optimizer=keras.optimizers.SGD(0.05)
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 64)).astype("float32")
    y = rng.integers(0, 2, (40, task.units)).astype("float32")
    y[::3, 0] = task.missing
    lp.export_trainable_tflite(model, tmp_path / "m.tflite", trainable="all", learning_rate=0.05)
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    compare(model, trainer, x, y, 20)
    model.reset_metrics()
    ours = model.evaluate(x, y, verbose=0, return_dict=True)
    theirs = trainer.evaluate(x, y)
    assert theirs == pytest.approx({name: ours[name] for name in theirs}, abs=1e-4)
    assert len(theirs) == 2


def soft(y):
    """Distributions near the labels; a row of -1 where one is missing."""
    rng = np.random.default_rng(0)
    near = 0.6 * np.eye(10)[y] + 0.4 * rng.dirichlet(np.ones(10), len(y))
    return np.where(np.arange(len(y))[:, None] % 7 == 0, -1, near).astype("float32")


def test_soft_labels_equal_keras(mlp, digits, tmp_path):
    x, y = digits[0], soft(digits[1])
    task = lp.Classification(10, class_weight={3: 2.0})
    model = lp.transfer_model(mlp(), task, trainable="all", optimizer="sgd", learning_rate=0.05)
    model.compile(keras.optimizers.SGD(0.05), model.loss, weighted_metrics=task.make_metrics())
    options = {"trainable": "all", "learning_rate": 0.05, "soft_labels": True}
    lp.export_trainable_tflite(model, tmp_path / "m.tflite", **options)
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    compare(model, trainer, x, y, 40)
    found = trainer.evaluate(x, y)["accuracy"]
    assert found == pytest.approx(model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"])
    number = lp.transfer_model(mlp(), lp.Regression())
    with pytest.raises(ValueError, match=r"lp\.Classification"):
        lp.export_trainable_tflite(number, tmp_path / "n.tflite", soft_labels=True)


def test_one_hot_labels_train_as_class_numbers_do(mlp, digits, tmp_path):
    x, y = digits
    y = np.where(np.arange(200) % 7 == 0, -1, y)
    lp.export_trainable_tflite(lp.transfer_model(mlp(), 10), tmp_path / "m.tflite")
    one_hot = np.where(y[:, None] < 0, np.nan, np.eye(10)[y])
    losses = [
        lp.DeviceTrainer(tmp_path / "m.tflite").fit(x, labels, epochs=2)
        for labels in (y, one_hot, y[:, None])
    ]
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(ValueError, match="soft_labels=True"):
        lp.DeviceTrainer(tmp_path / "m.tflite").fit(x, soft(y))


def test_ids_penalties_and_several_inputs_equal_keras(tmp_path):
    ids, extra = keras.Input((6,), dtype="int32", name="ids"), keras.Input((3,), name="extra")
    table = layers.Embedding(20, 4, embeddings_regularizer="l2")(ids)
    x = layers.LayerNormalization()(layers.GlobalAveragePooling1D()(table))
    x = layers.Concatenate()([x, layers.Dense(4, "silu")(extra)])
    model = keras.Model({"ids": ids, "extra": extra}, layers.Dense(1, "sigmoid")(x))
    model.compile(keras.optimizers.SGD(0.1), "binary_crossentropy")
    lp.export_trainable_tflite(model, tmp_path / "m.tflite", trainable="all", learning_rate=0.1)
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    rng = np.random.default_rng(0)
    data = {
        "ids": rng.integers(0, 20, (10, 6)).astype("int32"),
        "extra": rng.normal(size=(10, 3)).astype("float32"),
    }
    y = rng.integers(0, 2, 10).astype("float32")
    losses = trainer.fit(
        {f"x_{name}": value for name, value in data.items()}, y, epochs=5, shuffle=False
    )
    expected = []
    for _ in range(5):
        model.reset_metrics()
        expected.append(float(model.train_on_batch(data, y[:, None])))
    np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "operation"),
    [
        (layers.Dense(4, "elu", name="odd"), "Elu"),
        (layers.Dense(4, "gelu", name="odd"), "Erf"),
        (layers.GRU(4, name="odd"), ""),
        (layers.Conv1D(4, 2, dilation_rate=2, name="odd"), ""),
    ],
)
def test_a_layer_that_cannot_train_is_refused_by_name(layer, operation, tmp_path):
    inputs = keras.Input((5, 3))
    x = layer(inputs)
    x = layers.GlobalAveragePooling1D()(x) if len(x.shape) == 3 else x
    model = compiled(keras.Model(inputs, layers.Dense(2)(x)))
    with pytest.raises(ValueError, match=f"layer 'odd', which uses .*{operation}"):
        lp.export_trainable_tflite(model, tmp_path / "m.tflite", trainable="all")
    assert list(tmp_path.iterdir()) == []


def test_wrong_exports_are_refused(mlp, tmp_path):
    path = tmp_path / "m.tflite"
    model = lp.transfer_model(mlp(), 3)
    with pytest.raises(ValueError, match=r"one of \['sgd', 'momentum', 'adam'\]"):
        lp.export_trainable_tflite(model, path, optimizer="lion")
    with pytest.raises(ValueError, match="`batch_size` must be an integer"):
        lp.export_trainable_tflite(model, path, batch_size=0)
    with pytest.raises(ValueError, match="such layer has that name"):
        lp.export_trainable_tflite(model, path, trainable=["blck0"])
    with pytest.raises(TypeError, match="takes a Keras model"):
        lp.export_trainable_tflite("model.keras", path)
    with pytest.raises(ValueError, match="compiled with a loss"):
        lp.export_trainable_tflite(mlp(), path)
    with pytest.raises(ValueError, match="must have one output"):
        lp.export_trainable_tflite(lp.multitask_model(mlp(), {"a": 2, "b": 3}), path)
    named = compiled(keras.Sequential([keras.Input((3,)), layers.Dense(2, name="my head")]))
    with pytest.raises(ValueError, match="'my head'"):
        lp.export_trainable_tflite(named, path)
    summed = mlp()
    summed.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.raises(ValueError, match="reduction='sum'"):
        lp.export_trainable_tflite(summed, path)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = lp.transfer_model(mlp(), 3)
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match="bfloat16"):
        lp.export_trainable_tflite(mixed, path)
    with pytest.raises(ValueError, match="the folder"):
        lp.export_trainable_tflite(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_travel_exactly_and_only_to_their_model(transferred, digits, tmp_path):
    _, path, _ = transferred
    trainer, other = lp.DeviceTrainer(path), lp.DeviceTrainer(path)
    x, y = pictures(digits)
    trainer.fit(x[:20], y[:20])
    trainer.save_weights(tmp_path / "w.npz")
    other.load_weights(tmp_path / "w.npz")
    assert_same([*trainer.get_weights().values()], [*other.get_weights().values()])
    before = [*other.get_weights().values()]
    good = trainer.get_weights()
    kernel = "w8_predictions_kernel"
    for wrong, reason in [
        ({**good, "version": good["version"] + 1}, "from another model"),
        ({**good, kernel: good[kernel][:3]}, r"of shape \(3, 10\)"),
        ({**good, kernel: good[kernel] * np.nan}, "not finite"),
        ({"version": good["version"]}, "without"),
        ({**good, "more": good[kernel]}, "unknown"),
    ]:
        with pytest.raises(ValueError, match=reason):
            other.set_weights(wrong)
    assert_same(before, [*other.get_weights().values()])


def test_java_reads_the_same_weights(transferred):
    trainer = lp.DeviceTrainer(transferred[1])
    read = trainer._run["read_weights"](ignored=np.zeros(1, "float32"))
    for name, value in trainer.get_weights().items():
        np.testing.assert_array_equal(read.pop(name), value)
    assert not read


def test_wrong_examples_are_refused_on_the_device(transferred, digits, tmp_path):
    _, path, _ = transferred
    trainer = lp.DeviceTrainer(path)
    x, y = pictures(digits)
    for arguments, reason in [
        ((x[:, :5], y), r"shape \(examples, 8, 8, 1\)"),
        ((x[:5], y[:4]), "same number of examples"),
        ((x[:0], y[:0]), "at least one"),
        ((x[:5] * np.nan, y[:5]), "must be finite"),
        ((x[:5], y[:5] + 20), "from 0 to 9"),
        ((x[:5], y[:5] + 0.5), "must be integers"),
        ((x[:5], y[:5] * np.nan), "must be integers"),
        ((5, 5), "of shape"),
        (({"pixels": x}, y), r"Inputs must be \['x', 'y'\]"),
    ]:
        with pytest.raises(ValueError, match=reason):
            trainer.fit(*arguments)
    with pytest.raises(FileNotFoundError):
        lp.DeviceTrainer(tmp_path / "none.tflite")
    lp.export_tflite(compiled(dense()), tmp_path / "plain.tflite")
    with pytest.raises(ValueError, match="export_trainable_tflite"):
        lp.DeviceTrainer(tmp_path / "plain.tflite")


def test_the_trainer_is_one_file_that_needs_neither_keras_nor_tensorflow(
    transferred, digits, tmp_path
):
    shutil.copy(device_module.__file__, tmp_path / "device.py")
    shutil.copy(transferred[1], tmp_path / "m.tflite")
    x, y = pictures(digits)
    np.savez(tmp_path / "data.npz", x=x[:40], y=y[:40])
    code = """
import sys
for name in ("tensorflow", "keras", "keras_lp"):
    sys.modules[name] = None  # importing it raises
import numpy as np
from device import DeviceTrainer
data = np.load("data.npz")
trainer = DeviceTrainer("m.tflite")
losses = trainer.fit(data["x"], data["y"], epochs=4)
trainer.save_weights("update.npz")
trainer.load_weights("update.npz")
assert losses[-1] < losses[0], losses
print(trainer.evaluate(data["x"], data["y"]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stdout


LOSSES = {
    "all labels": (2, lambda y: y),
    "the first missing": (2, lambda y: np.where(np.arange(60) < 20, -1, y)),
    "two of three missing": (2, lambda y: np.where(np.arange(60) % 3, -1, y)),
    "class weights": (lp.Classification(2, class_weight={1: 9.0}), lambda y: y),
    "labels": (
        lp.MultiLabel(2, class_weight={1: 3.0}),
        lambda y: np.stack([y, np.where(np.arange(60) < 45, -1, 1 - y)], 1),
    ),
    "numbers": (
        lp.Regression(mean=0.0, std=2.0),
        lambda y: np.where(np.arange(60) % 4, np.nan, y).astype("float32"),
    ),
}


@pytest.mark.parametrize(("task", "make"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("trainable", ["head", "all"])
def test_the_losses_shown_are_kerass(task, make, trainable, mlp, tmp_path):
    """Over batches of 16 examples, the last of 12, with uneven numbers of labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype("float32")
    y = make((x[:, 0] > 0).astype("int32"))
    model = lp.transfer_model(
        mlp((6,), inputs=4), task, trainable=trainable, pretrained=True,
        optimizer=keras.optimizers.SGD(0.05), cache_features=False,
    )  # fmt: skip
    options = {"trainable": trainable, "learning_rate": 0.05, "batch_size": 16}
    lp.export_trainable_tflite(model, tmp_path / "m.tflite", **options)
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    history = model.fit(x, y, shuffle=False, batch_size=16, epochs=2, verbose=0).history
    losses = trainer.fit(x, y, shuffle=False, epochs=2)
    np.testing.assert_allclose(losses, history["loss"], atol=1e-5)
    theirs, ours = trainer.evaluate(x, y), model.evaluate(x, y, verbose=0, return_dict=True)
    shared = theirs.keys() & ours.keys()
    assert "loss" in shared
    assert {name: theirs[name] for name in shared} == pytest.approx(
        {name: ours[name] for name in shared}, abs=1e-5
    )


def test_a_loss_of_plain_keras_and_one_without_labels(mlp, digits, tmp_path):
    x, y = digits[0][:60], digits[1][:60]
    model = compiled(dense(), keras.optimizers.SGD(0.05))
    lp.export_trainable_tflite(model, tmp_path / "m.tflite", trainable="all", learning_rate=0.05)
    history = model.fit(x, y, shuffle=False, batch_size=16, verbose=0).history
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    assert trainer.fit(x, y, shuffle=False) == pytest.approx(history["loss"], abs=1e-5)
    model = lp.transfer_model(mlp(), 10, optimizer="sgd")
    lp.export_trainable_tflite(model, tmp_path / "m.tflite")
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    none = np.full(60, -1)
    before = trainer.get_weights()
    assert np.isnan(trainer.fit(x, none)).all()
    assert np.isnan([*trainer.evaluate(x, none).values()]).all()
    assert_same([*before.values()], [*trainer.get_weights().values()])


@pytest.mark.parametrize("content", [b"junk" * 9, b"", None])
def test_what_is_no_file_of_weights_is_named(transferred, tmp_path, content):
    path = tmp_path / "weights.npz"
    if content is None:
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(content)
    trainer = lp.DeviceTrainer(transferred[1])
    with pytest.raises(ValueError, match=r"Received: .*weights\.npz.*Save or send it") as found:
        trainer.load_weights(path)
    assert "pickle" not in str(found.value)
    with pytest.raises(FileNotFoundError):
        trainer.load_weights(tmp_path / "absent.npz")
