"""FedAvg, FedSGD, FedProx and the server optimizers against NumPy, over two rounds."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)

RATE = 0.05
_rng = np.random.default_rng(7)
CLIENTS = {
    name: (_rng.normal(size=(n, 3)).astype("float32"), _rng.normal(size=n).astype("float32"))
    for name, n in {"a": 5, "b": 12, "c": 31}.items()
}
START = np.array([0.5, -1.0, 2.0, 0.1])  # three weights and a bias


class Mean:
    """FedAvg's server: the mean update is added."""

    def step(self, gradient):
        return -gradient


class Momentum:
    """FedAvgM (Hsu et al., 2019): v = 0.9 v + update, added at rate 0.7."""

    velocity = 0.0

    def step(self, gradient):
        self.velocity = 0.9 * self.velocity - 0.7 * gradient
        return self.velocity


class Adaptive:
    """Algorithm 2 of Reddi et al., 2021; Adam with Keras's bias correction."""

    def __init__(self, kind):
        self.kind, self.m, self.v, self.t = kind, 0.0, 1e-6 if kind == "yogi" else 0.0, 0

    def step(self, gradient):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        square = gradient**2
        if self.kind == "yogi":
            self.v = self.v - 0.01 * square * np.sign(self.v - square)
            return -1e-2 * self.m / (np.sqrt(self.v) + 1e-3)
        self.v = 0.99 * self.v + 0.01 * square
        rate = 1e-2 * np.sqrt(1 - 0.99**self.t) / (1 - 0.9**self.t)
        return -rate * self.m / (np.sqrt(self.v) + 1e-3)


class Adagrad:
    """FedAdagrad in Keras's form: the accumulator starts at 1e-6."""

    total = 1e-6

    def step(self, gradient):
        self.total = self.total + gradient**2
        return -1e-2 * gradient / np.sqrt(self.total + 1e-7)


def rounds_in_numpy(server, epochs=1, proximal=0.0, weighting="examples", rounds=2):
    w = START.copy()
    for _ in range(rounds):
        total, updates = 0.0, 0.0
        for x, y in CLIENTS.values():
            inputs = np.column_stack([x, np.ones(len(x))]).astype("float64")
            own = w.copy()
            for _ in range(epochs):
                gradient = 2 * inputs.T @ (inputs @ own - y) / len(y)
                own -= RATE * (gradient + proximal * (own - w))
            weight = len(y) if weighting == "examples" else 1
            total, updates = total + weight, updates + weight * (w - own)
        w = w + server.step(updates / total)
    return w


def fit(rounds=2, **arguments):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(RATE), "mse")
    model.set_weights([START[:3, None], START[3:]])
    federated = lp.FederatedAveraging(model, batch_size=None, **arguments)
    history = federated.fit(CLIENTS, rounds, verbose=0).history
    return np.concatenate([w.ravel() for w in model.get_weights()]), history


@pytest.mark.parametrize(
    ("server", "arguments"),
    [
        (Mean(), {}),
        (Mean(), {"local_epochs": 3}),
        (Mean(), {"local_epochs": 3, "weighting": "uniform"}),
        (Mean(), {"local_epochs": 3, "proximal_strength": 2.0}),
        (Momentum(), {"server_optimizer": keras.optimizers.SGD(0.7, momentum=0.9)}),
        (Adaptive("adam"), {"server_optimizer": "adam"}),
        (Adaptive("yogi"), {"server_optimizer": "yogi"}),
        (Adagrad(), {"server_optimizer": "adagrad"}),
    ],
    ids=["FedSGD", "FedAvg", "uniform", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"],
)
def test_two_rounds_equal_numpy(server, arguments):
    weights, _ = fit(**arguments)
    expected = rounds_in_numpy(
        server,
        epochs=arguments.get("local_epochs", 1),
        proximal=arguments.get("proximal_strength", 0.0),
        weighting=arguments.get("weighting", "examples"),
    )
    assert np.abs(expected - START).max() > 1e-3
    np.testing.assert_allclose(weights, expected, atol=1e-5)


def test_history_has_the_norm_of_the_mean_update_and_the_bytes():
    _, history = fit(rounds=1)
    expected = np.linalg.norm(rounds_in_numpy(Mean(), rounds=1) - START)
    assert history["update_norm"] == pytest.approx([expected], rel=1e-4)
    assert history["bytes_up"] == history["bytes_down"] == [3 * 4 * 4]
    assert history["seconds"][0] > 0
