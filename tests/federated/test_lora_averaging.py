"""Averages of adapters against the mean of the clients' models by hand."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.model.adapters import adapted_layers

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)

_rng = np.random.default_rng(0)
CLIENTS = {
    f"c{i}": (_rng.normal(size=(n, 6, 6, 2)).astype("float32"), _rng.integers(0, 3, n))
    for i, n in enumerate([8, 12, 5])
}
SHARES = np.array([8, 12, 5]) / 25


def make(rank=2, alpha=3.0, kernels=None, **arguments):
    """A convolutional and a dense layer with adapters."""
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((6, 6, 2)),
        keras.layers.Conv2D(3, 3, activation="tanh", name="picture"),
        keras.layers.Flatten(),
        keras.layers.Dense(5, "tanh", name="below"),
    ]
    model = lp.transfer_model(keras.Sequential(layers), 3, pooling=None, cache_features=False)
    options = {"optimizer": "sgd", "learning_rate": 0.5, **arguments}
    model = lp.finetune_model(model, lora=lp.LoRA(rank=rank, alpha=alpha), **options)
    for layer in adapted_layers(model):  # B is 0 at first, so that A would hardly change
        b = layer.lora_kernel_b
        b.assign(np.random.default_rng(7).normal(0, 0.3, b.shape))
    for layer, kernel in zip(adapted_layers(model), kernels or (), strict=False):
        layer._kernel.assign(kernel)
    return model


def effective(model):
    """The kernels with their adapters, and the weights of the head."""
    found = []
    for layer in adapted_layers(model):
        a, b, kernel = (
            v.numpy() for v in (layer.lora_kernel_a, layer.lora_kernel_b, layer._kernel)
        )
        found.append(kernel + layer.lora_alpha / layer.lora_rank * a @ b)
    return [*found, *(variable.numpy() for variable in model.layers[-1].trainable_variables)]


def trained_alone(client, steps=3, **arguments):
    model = make(**arguments)
    x, y = CLIENTS[client]
    for _ in range(steps):
        keras.Model.fit(model, x, y, batch_size=len(x), epochs=1, verbose=0)
    return model


def mean(models):
    parts = zip(*(effective(model) for model in models), strict=True)
    return [np.tensordot(SHARES, np.stack(part), 1) for part in parts]


def distance(model, expected):
    return [np.abs(a - b).max() for a, b in zip(effective(model), expected, strict=True)]


def test_the_model_is_the_mean_of_the_clients_models():
    expected = mean([trained_alone(client) for client in CLIENTS])
    model, other = make(), make()
    options = {"batch_size": None, "local_epochs": 3}
    exact = lp.FederatedAveraging(model, lora_averaging="exact", **options)
    history = exact.fit(CLIENTS, 1, verbose=0)
    assert max(distance(model, expected)) < 1e-5
    separate = lp.FederatedAveraging(other, **options)
    without = separate.fit(CLIENTS, 1, verbose=0)
    assert min(distance(other, expected)[:2]) > 1e-4
    for layer, before in zip(adapted_layers(other), adapted_layers(make()), strict=True):
        np.testing.assert_array_equal(layer._kernel, before._kernel)
    # Kernels of 3 * 3 * 2 * 3 and 48 * 5, of which A and B of three clients are more.
    assert history.history["bytes_up"] == without.history["bytes_up"]
    extra = history.history["bytes_down"][0] - without.history["bytes_down"][0]
    assert extra == 3 * 4 * (54 + 240)


def test_the_mean_of_compressed_updates():
    model = make()
    federated = lp.FederatedAveraging(
        model, compression=lp.Quantize(8), batch_size=None, lora_averaging="exact"
    )
    federated.fit(CLIENTS, 1, verbose=0)
    expected = mean([trained_alone(client, steps=1) for client in CLIENTS])
    assert max(distance(model, expected)) < 0.02


def test_a_client_with_a_lower_rank_adds_the_rest_to_its_kernel():
    whole = make()
    kernels = []
    for layer in adapted_layers(whole):
        a, b = (v.numpy() for v in (layer.lora_kernel_a, layer.lora_kernel_b))
        kernels.append(layer._kernel.numpy() + 1.5 * a[..., 1:] @ b[1:])
    alone = make(rank=1, alpha=1.5, kernels=kernels)
    for small, large in zip(adapted_layers(alone), adapted_layers(whole), strict=True):
        small.lora_kernel_a.assign(large.lora_kernel_a.numpy()[..., :1])
        small.lora_kernel_b.assign(large.lora_kernel_b.numpy()[:1])
    np.testing.assert_allclose(effective(alone)[0], effective(whole)[0], atol=1e-6)
    x, y = CLIENTS["c0"]
    for _ in range(3):
        keras.Model.fit(alone, x, y, batch_size=len(x), epochs=1, verbose=0)
    models = [alone, trained_alone("c1"), trained_alone("c2")]
    model = make()
    federated = lp.FederatedAveraging(
        model,
        batch_size=None,
        local_epochs=3,
        lora_averaging="exact",
        lora_ranks={"c0": 1, "elsewhere": 2},
    )
    history = federated.fit(CLIENTS, 1, verbose=0)
    assert max(distance(model, mean(models))) < 1e-5
    # A and B of rank 1: 18 + 3 and 48 + 5; the head has 18.
    adapters = 18 + 3 + 48 + 5
    others = sum(int(np.prod(v.shape)) for v in model.trainable_variables) - 2 * adapters
    assert history.history["bytes_up"] == [4 * (5 * adapters + 3 * others)]


def test_clients_train_only_their_rank_with_any_optimizer():
    model = make(optimizer=keras.optimizers.AdamW(0.1, weight_decay=0.1))
    federated = lp.FederatedAveraging(model, lora_ranks=dict.fromkeys(CLIENTS, 1))
    federated.fit(CLIENTS, 1, verbose=0)
    for layer, before in zip(adapted_layers(model), adapted_layers(make()), strict=True):
        a, b, a0, b0 = (
            v.numpy() for one in (layer, before) for v in (one.lora_kernel_a, one.lora_kernel_b)
        )
        np.testing.assert_allclose(a[..., 1], a0[..., 1], atol=1e-6)
        np.testing.assert_allclose(b[1], b0[1], atol=1e-6)
        assert np.abs(a[..., 0] - a0[..., 0]).max() > 1e-3


class StopAfter(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_training_goes_on_after_a_kill(tmp_path):
    def federation(model):
        return lp.FederatedAveraging(model, clients_per_round=2, lora_averaging="exact")

    whole, again = make(), make()
    federation(whole).fit(CLIENTS, 5, verbose=0)
    options = {"checkpoint_dir": tmp_path, "checkpoint_freq": 2, "verbose": 0}
    with pytest.raises(KeyboardInterrupt):
        federation(make()).fit(CLIENTS, 5, callbacks=StopAfter(), **options)
    federation(again).fit(CLIENTS, 5, **options)
    assert max(distance(again, effective(whole))) < 1e-6
    again.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x, _ = CLIENTS["c0"]
    np.testing.assert_allclose(loaded.predict(x, verbose=0), whole.predict(x, verbose=0), atol=1e-5)


def test_where_exact_averaging_is_not_possible():
    privacy = lp.DifferentialPrivacy(noise_multiplier=0.5, clip=1.0, delta=1e-3, seed=0)
    personal = {"personal_layers": ["picture", "below"]}
    for arguments in ({"privacy": privacy}, {"aggregation": "median"}, personal):
        with pytest.raises(ValueError, match="Exact averaging needs shared adapters"):
            lp.FederatedAveraging(make(), lora_averaging="exact", **arguments)
        model = make()
        lp.FederatedAveraging(model, **arguments).fit(CLIENTS, 1, verbose=0)
        for layer, before in zip(adapted_layers(model), adapted_layers(make()), strict=True):
            np.testing.assert_array_equal(layer._kernel, before._kernel)


def test_wrong_arguments():
    plain = lp.transfer_model(
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)]), 2, optimizer="sgd"
    )
    for arguments in ({"lora_averaging": "exact"}, {"lora_ranks": {"c0": 1}}):
        with pytest.raises(ValueError, match="need a model with adapters"):
            lp.FederatedAveraging(plain, **arguments)
    with pytest.raises(ValueError, match=r"integers from 1 to 2.*Received: {'c0': 3}"):
        lp.FederatedAveraging(make(), lora_ranks={"c0": 3, "c1": 1})
    with pytest.raises(ValueError, match="send their updates as they are"):
        lp.FederatedAveraging(make(), lora_ranks={"c0": 1}, compression=lp.Quantize(8))
    backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="whole")])
    backbone.quantize("int8", filters="whole")
    whole = lp.finetune_model(lp.transfer_model(backbone, 2), lora=lp.LoRA(rank=2), optimizer="sgd")
    with pytest.raises(ValueError, match="must be floating-point numbers"):
        lp.FederatedAveraging(whole, lora_averaging="exact")
    with pytest.raises(ValueError, match="`lora_averaging` must be one of"):
        lp.FederatedAveraging(make(), lora_averaging="mean")
