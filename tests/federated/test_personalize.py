"""Personal models against fine-tuning by hand, on clients that differ and clients that do not."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def make(frozen=True):
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu")])
    arguments = {} if frozen else {"pretrained": False, "trainable": "all"}
    return lp.transfer_model(backbone, 10, optimizer="sgd", learning_rate=0.1, **arguments)


@pytest.fixture(scope="module")
def data():
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    return x.reshape(len(x), 64).astype("float32") / 255, y


@pytest.fixture(scope="module")
def federations(data):
    """A federation each over clients of two labels and over equal parts, and their clients."""
    found = {}
    for name, how in {"two labels": {"shards": 2}, "equal parts": {}}.items():
        train, test = lp.split_clients(lp.partition(data, clients=12, **how))
        federated = lp.FederatedAveraging(make())
        federated.fit(train, rounds=8, verbose=0)
        found[name] = federated, train, test
    return found


def test_each_client_is_divided_in_the_same_way_each_time(data):
    clients = lp.partition(data, clients=5, alpha=0.5)
    parts = lp.split_clients(clients, held_out=0.2, seed=3)
    again = lp.split_clients(clients, held_out=0.2, seed=3)
    for client, (x, y) in clients.items():
        joined = np.concatenate([part[client][0] for part in parts])
        assert sorted(map(bytes, joined)) == sorted(map(bytes, x))
        assert len(parts[1][client][1]) == max(1, round(0.2 * len(y)))
        np.testing.assert_array_equal(parts[1][client][0], again[1][client][0])
    other = lp.split_clients(clients, held_out=0.2, seed=4)
    assert not np.array_equal(parts[1]["client_0"][0], other[1]["client_0"][0])


def test_personal_models_win_where_clients_differ(federations):
    personal = lp.personalize(*federations["two labels"], epochs=3, verbose=0)
    assert personal.metric == "accuracy"
    assert personal.verdict == "better"
    assert personal.change.mean() > 0.1
    text = str(personal)
    assert "12 clients, on examples that were held out" in text
    assert text.endswith(": better.")


def test_nothing_is_claimed_where_clients_are_alike(federations):
    personal = lp.personalize(*federations["equal parts"], verbose=0)
    assert personal.verdict != "better"
    assert str(personal).endswith(f": {personal.verdict}.")


def test_a_personal_model_is_the_global_one_fine_tuned_by_hand(federations):
    federated, train, test = federations["two labels"]
    before = federated.model.get_weights()
    personal = lp.personalize(federated, train, test, epochs=2, batch_size=16, verbose=0)
    for a, b in zip(federated.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    (x, y), (x_test, y_test) = train["client_03"], test["client_03"]
    model = make()
    model.set_weights(before)
    order = np.random.default_rng((0, 3)).permutation(len(y))
    model.fit(x[order], y[order], epochs=2, batch_size=16, shuffle=False, verbose=0)
    found = personal.model("client_03")
    np.testing.assert_allclose(
        found.predict(x_test, verbose=0), model.predict(x_test, verbose=0), atol=1e-4
    )
    assert personal.after["client_03"] == pytest.approx(
        model.evaluate(x_test, y_test, verbose=0)[1], abs=1e-6
    )
    model.set_weights(before)
    assert personal.before["client_03"] == pytest.approx(
        model.evaluate(x_test, y_test, verbose=0)[1], abs=1e-6
    )
    assert type(found).__module__.startswith("keras.")


def test_a_scale_that_a_client_sets_is_its_own(data):
    train, test = lp.split_clients(lp.partition(data, clients=20))
    privacy = lp.DifferentialPrivacy(noise_multiplier=1, delta=1e-3, clip=1.0)
    federated = lp.FederatedAveraging(make(), privacy=privacy)
    federated.fit(train, 1, verbose=0)  # private, so features are not scaled
    before = [variable.numpy() for variable in federated.model.variables]
    personal = lp.personalize(federated, train, test, verbose=0)
    for a, b in zip(federated.model.variables, before, strict=True):
        np.testing.assert_array_equal(a, b)
    x, y = test["client_00"]
    found = personal.model("client_00").predict(x, verbose=0)
    assert personal.after["client_00"] == pytest.approx((found.argmax(1) == y).mean(), abs=1e-6)


def test_the_verdict_is_the_interval_of_student():
    def made(*change, direction=1):
        before = dict.fromkeys(range(len(change)), 0.5)
        after = {i: 0.5 + one for i, one in enumerate(change)}
        return lp.PersonalModels("accuracy", before, after, direction, {}, lambda _: None)

    # 0.1, 0.2, 0.3: mean 0.2, margin 4.303 * 0.1 / sqrt(3) = 0.248
    assert made(0.1, 0.2, 0.3).verdict == "not told apart"
    assert "(95 % interval -0.0484 to +0.4484)" in str(made(0.1, 0.2, 0.3))
    assert made(0.19, 0.2, 0.21).verdict == "better"
    assert made(0.19, 0.2, 0.21, direction=-1).verdict == "worse"
    assert made(0.5).verdict == "not told apart"


def test_wrong_input(federations, data):
    federated, train, test = federations["equal parts"]
    few = {"client_00": test["client_00"]}
    with pytest.raises(ValueError, match="11 clients that only one of them has"):
        lp.personalize(federated, train, few)
    with pytest.raises(ValueError, match="`metric` must be one of"):
        lp.personalize(federated, few, few, metric="acuracy", verbose=0)
    personal = lp.personalize(federated, few, few, verbose=0)
    with pytest.raises(ValueError, match="Did you mean 'client_00'"):
        personal.model("client_0")
    with pytest.raises(ValueError, match="`held_out` must be between 0 and 1"):
        lp.split_clients(train, held_out=1)
    with pytest.raises(ValueError, match="1 of client 'a'"):
        lp.split_clients({"a": (data[0][:1], data[1][:1])})
