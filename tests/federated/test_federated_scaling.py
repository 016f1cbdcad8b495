"""The scale of the features in a federation: that of all clients' features together."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.backbones.features import feature_model
from keras_lp.federated.engine import installation

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def head_of(model):
    return model.get_layer("predictions")


def expected_scale(model, x):
    """Mean and reciprocal deviation of the columns; a constant column stays as it is."""
    z = feature_model(model).predict(x, verbose=0).astype("float64")
    z = z.reshape(-1, z.shape[-1])
    varies = z.std(0) > 0
    std = np.maximum(z.std(0), 0.3 * np.median(z.std(0)[varies]))
    return np.where(varies, z.mean(0), 0), 1 / np.where(varies, std, 1)


def assert_scale(model, x):
    found = head_of(model).input_mean, head_of(model).input_scale
    for ours, expected in zip(found, expected_scale(model, x), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def sgd_model(backbone, rate=0.1, **options):
    return lp.transfer_model(backbone, 10, optimizer="sgd", learning_rate=rate, **options)


def test_one_round_over_all_clients_is_one_step_of_fit_on_all_examples(mlp, digits):
    backbone = mlp()
    central, federated = sgd_model(backbone), sgd_model(backbone)
    central.fit(*digits, batch_size=200, verbose=0)
    clients = lp.partition(digits, by=digits[1])  # one label per client
    lp.FederatedAveraging(federated, batch_size=None).fit(clients, 1, verbose=0)
    assert_scale(federated, digits[0])
    for ours, expected in zip(
        head_of(federated).raw_weights(), head_of(central).raw_weights(), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_clients_of_the_first_round_give_the_scale(mlp, digits):
    clients = lp.partition(digits, clients=8, seed=1)
    model = sgd_model(mlp())
    federated = lp.FederatedAveraging(model, clients_per_round=3, seed=2)
    sampled = []
    loaded = (list(clients), lambda client: sampled.append(client) or clients[client])
    history = federated.fit(loaded, 1, verbose=0)
    assert len(set(sampled)) == 3
    assert_scale(model, np.concatenate([clients[client][0] for client in set(sampled)]))
    first = np.array(head_of(model).input_mean)
    later = federated.fit(clients, 2, verbose=0)
    np.testing.assert_array_equal(head_of(model).input_mean, first)
    # Up: count, and 16 sums and 16 squares of 8 bytes; down: means and scales of 4.
    weights = 4 * (16 * 10 + 10)
    assert history.history["bytes_up"] == [3 * (weights + 8 + 2 * 16 * 8)]
    assert history.history["bytes_down"] == [3 * (weights + 2 * 16 * 4)]
    assert later.history["bytes_up"] == later.history["bytes_down"] == [3 * weights] * 2


def test_what_has_no_scale(mlp, digits):
    clients = lp.partition(digits, clients=2)
    plain = sgd_model(mlp(), cache_features=False)
    lp.FederatedAveraging(plain).fit(clients, 1, verbose=0)
    assert not np.any(head_of(plain).input_mean)
    known = sgd_model(mlp())
    known.fit(digits[0][:50], digits[1][:50], verbose=0)
    lp.FederatedAveraging(known).fit(clients, 1, verbose=0)
    assert_scale(known, digits[0][:50])


def test_each_step_of_a_sequence_counts():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (30, 5, 4)).astype("float32")
    y = rng.integers(0, 2, (30, 5))
    backbone = keras.Sequential([keras.Input((5, 4)), keras.layers.Dense(6, "relu")])
    model = lp.transfer_model(backbone, 2, pooling=None, optimizer="sgd", learning_rate=0.1)
    lp.FederatedAveraging(model).fit(lp.partition((x, y), clients=3), 1, verbose=0)
    assert_scale(model, x)


def test_features_that_are_not_finite_count_nothing(digits):
    x, y = digits
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.ReLU()])
    backbone.layers[0].set_weights([10 * np.eye(64), np.zeros(64)])
    model = sgd_model(backbone)
    large = {1: (x[:100], y[:100]), 2: (x[100:] * np.float32(3e38), y[100:])}
    with pytest.warns(UserWarning, match="1 of 2 clients were not finite"):
        lp.FederatedAveraging(model).fit((list(large), large.get), 1, verbose=0)
    assert_scale(model, x[:100])


class KilledError(Exception):
    pass


def kill_at(round_number):
    def end(epoch, logs):
        if epoch + 1 == round_number:
            raise KilledError

    return keras.callbacks.LambdaCallback(on_epoch_end=end)


def test_a_killed_federation_goes_on_with_its_scale(mlp, digits, tmp_path):
    backbone = mlp()
    clients = lp.partition(digits, clients=5)

    def run(folder, rounds=(4, 1), **arguments):
        model = sgd_model(backbone)
        federated = lp.FederatedAveraging(model, clients_per_round=2)
        for count in rounds:
            federated.fit(clients, count, checkpoint_dir=folder, verbose=0, **arguments)
        return [head_of(model).input_scale, *head_of(model).raw_weights()]

    whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", callbacks=kill_at(3))
    for ours, expected in zip(run(tmp_path / "killed"), whole, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_defaults_come_near_the_solved_head_with_two_labels_a_client(mlp):
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x = x.reshape(-1, 64).astype("float32") / 255
    train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    backbone = mlp((64,))
    clients = lp.partition(train, clients=10, shards=2)
    scores = {}
    for name, options in {"scaled": {}, "plain": {"cache_features": False}}.items():
        model = lp.transfer_model(backbone, 10, optimizer="sgd", **options)
        lp.FederatedAveraging(model).fit(clients, 20, verbose=0)
        scores[name] = model.evaluate(*test, verbose=0)[1]
    lp.FederatedAveraging(model).fit_head(clients, verbose=0)
    solved = model.evaluate(*test, verbose=0)[1]
    assert scores["scaled"] > solved - 0.03
    assert scores["plain"] < scores["scaled"] - 0.1
