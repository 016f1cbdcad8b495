"""Fine-tuned models on a device: layer rates and adapters, compared with Keras."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from tests.tflite.test_tflite_training import compare

pytest.importorskip("ai_edge_litert.interpreter")


def finetuned(mlp, optimizer=None, **options):
    """A network of two blocks; its frozen biases are 0 where adapters train."""
    keras.utils.set_random_seed(0)
    network = mlp((16, 16))
    model = lp.transfer_model(network, 10, pretrained=False, trainable="all", pooling=None)
    optimizer = optimizer or keras.optimizers.SGD(0.05)  # without weight decay
    made = lp.finetune_model(model, optimizer=optimizer, **options)
    made.jit_compile = False
    return made


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("sgd", None),
        ("momentum", keras.optimizers.SGD(0.05, momentum=0.9)),
        ("adam", keras.optimizers.Adam(0.05)),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_layer_rates_train_as_in_keras(kind, optimizer, mlp, digits, tmp_path):
    model = finetuned(mlp, optimizer, layer_decay=0.3)
    report = lp.export_trainable_tflite(
        model, tmp_path / "m.tflite", trainable="all", optimizer=kind, learning_rate=0.05
    )
    expected = [0.05 * factor for factor in (0.09, 0.09, 0.3, 0.3, 1, 1)]
    assert list(report.rates.values()) == pytest.approx(expected)
    assert "learning rate 0.0045 to 0.05 by layer" in str(report)
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    compare(model, trainer, *digits, 60, loss_atol=1e-4, weights_atol=2e-4)


def test_only_the_chosen_part_trains_at_its_rates(mlp, tmp_path):
    model = finetuned(mlp, layer_decay=0.3)
    report = lp.export_trainable_tflite(model, tmp_path / "m.tflite", trainable=1, learning_rate=1)
    assert list(report.rates.values()) == pytest.approx([0.3, 0.3, 1, 1])
    plain = lp.export_trainable_tflite(
        lp.transfer_model(mlp(), 10, pooling=None), tmp_path / "p.tflite", learning_rate=0.5
    )
    assert set(plain.rates.values()) == {0.5}
    assert "learning rate 0.5, batch" in str(plain)


@pytest.mark.parametrize("biased", [False, True])
def test_adapters_train_as_in_keras(biased, mlp, digits, tmp_path):
    """With frozen biases of 0, the converter would lose the activations after them."""
    model = finetuned(mlp, lora=lp.LoRA(3))
    if biased:
        for name in ("block0", "block1"):
            bias = next(v for v in model.weights if v.path.endswith(f"{name}/bias"))
            bias.assign(np.linspace(-0.2, 0.2, 16))
    kernels = [v.numpy() for v in model.weights if v.path.endswith("block0/kernel")]
    report = lp.export_trainable_tflite(
        model, tmp_path / "m.tflite", trainable="all", learning_rate=0.05
    )
    assert [name.split("_", 1)[1] for name in report.trained] == [
        "block0_lora_kernel_a", "block0_lora_kernel_b", "block1_lora_kernel_a",
        "block1_lora_kernel_b", "predictions_kernel", "predictions_bias",
    ]  # fmt: skip
    trainer = lp.DeviceTrainer(tmp_path / "m.tflite")
    x, y = digits
    expected = keras.ops.softmax(model.predict(x[:20], verbose=0))
    np.testing.assert_allclose(trainer.predict(x[:20]), expected, atol=1e-6)
    compare(model, trainer, x, y, 100)
    (kernel,) = [v.numpy() for v in model.weights if v.path.endswith("block0/kernel")]
    np.testing.assert_array_equal(kernel, kernels[0])


def test_phones_average_adapters(mlp, digits, tmp_path):
    """The server of a federation sees adapters and head alone."""
    model = finetuned(mlp, lora=lp.LoRA(3))
    lp.export_trainable_tflite(model, tmp_path / "m.tflite", trainable="all", learning_rate=0.05)
    x, y = digits
    updates = []
    for rows in (slice(0, 100), slice(100, 200)):
        phone = lp.DeviceTrainer(tmp_path / "m.tflite")
        phone.fit(x[rows], y[rows], epochs=2)
        updates.append(phone.get_weights())
    done = lp.aggregate_device_updates(model, updates)
    assert done.accepted == (0, 1)
    head = model.get_layer("predictions").kernel.numpy()
    name = next(name for name in updates[0] if name.endswith("predictions_kernel"))
    np.testing.assert_allclose(head, (updates[0][name] + updates[1][name]) / 2, atol=1e-6)
    phone.set_weights(done.weights)
    expected = keras.ops.softmax(model.predict(x[:20], verbose=0))
    np.testing.assert_allclose(phone.predict(x[:20]), expected, atol=1e-5)
