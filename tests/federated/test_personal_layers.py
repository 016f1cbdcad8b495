"""Personal layers against rounds by hand in Keras, and after a kill."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.client_store import ClientStore
from keras_lp.federated.engine import installation
from keras_lp.federated.engine.personal import Personal

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)

RATE = 0.1
_rng = np.random.default_rng(3)
CLIENTS = {
    f"c{i}": (_rng.normal(size=(n, 6)).astype("float32") + i, _rng.integers(0, 3, n))
    for i, n in enumerate([8, 12, 5])
}


def make(normalization=False, activation="tanh", **arguments):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((6,)), keras.layers.Dense(5, activation, name="below")]
    if normalization:
        layers.append(keras.layers.BatchNormalization(name="statistics"))
    options = {"pretrained": False, "trainable": "all", "optimizer": "sgd", "learning_rate": RATE}
    return lp.transfer_model(keras.Sequential(layers), 3, **{**options, **arguments})


def by_hand(model, names, rounds, momentum=None):
    """Full-batch rounds in Keras; returns the shared weights and those of each client by layer."""
    inner = [layer for layer in model.layers if layer.name == "sequential" or layer.weights]
    layers = [part for layer in inner for part in getattr(layer, "layers", [layer])]
    own = {id(v) for layer in layers if layer.name in names for v in layer.weights}
    shared = [v for v in model.trainable_variables if id(v) not in own]
    personal = [v for layer in layers if layer.name in names for v in layer.weights]
    if momentum is not None:
        model.get_layer(index=1).get_layer("statistics").momentum = momentum
    values = {client: [v.numpy() for v in personal] for client in CLIENTS}
    for _ in range(rounds):
        start, total, count = [v.numpy() for v in shared], 0, 0
        for client, (x, y) in CLIENTS.items():
            for variable, value in zip(
                [*shared, *personal], [*start, *values[client]], strict=True
            ):
                variable.assign(value)
            keras.Model.fit(model, x, y, batch_size=len(x), epochs=1, verbose=0)
            values[client] = [v.numpy() for v in personal]
            total = [
                len(x) * v.numpy() + (0 if count == 0 else total[i]) for i, v in enumerate(shared)
            ]
            count += len(x)
        for variable, value in zip(shared, total, strict=True):
            variable.assign(value / count)
    return shared, values


@pytest.mark.parametrize(("layers", "names"), [("head", ["predictions"]), (["below"], ["below"])])
def test_personal_layers_are_trained_by_each_client_alone(layers, names):
    oracle = make(cache_features=False)
    shared, values = by_hand(oracle, names, rounds=3)
    model = make(cache_features=False)
    federated = lp.FederatedAveraging(model, batch_size=None, personal_layers=layers)
    history = federated.fit(CLIENTS, rounds=3, verbose=0)
    personal = Personal(model, layers)
    for ours, theirs in zip(personal.shared, shared, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for client, expected in values.items():
        variables, found = federated._personal.of_client(client)
        assert [v.shape for v in variables] == [one.shape for one in expected]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    size = sum(int(np.prod(v.shape)) for v in shared)
    assert history.history["bytes_up"] == [3 * 4 * size] * 3
    # The model itself keeps the initial personal weights.
    fresh = Personal(make(), layers)
    np.testing.assert_allclose(personal.values(), fresh.values())


def test_batch_normalization_trains_on_its_client():
    """Of 3 rounds with one step each, the averages remember the last steps only."""
    oracle = make(normalization=True)
    shared, values = by_hand(oracle, ["statistics"], rounds=3, momentum=0.5)
    model = make(normalization=True)
    federated = lp.FederatedAveraging(model, batch_size=None, personal_layers="normalization")
    federated.fit(CLIENTS, rounds=3, verbose=0)
    assert model.get_layer(index=1).get_layer("statistics").momentum == 0.99
    personal = Personal(model, "normalization")
    assert [v.name for v in personal.states] == ["moving_mean", "moving_variance"]
    for ours, theirs in zip(personal.shared, shared, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for client, expected in values.items():
        for one, other in zip(federated._personal.of_client(client)[1], expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    means = [federated._personal.of_client(client)[1][2] for client in CLIENTS]
    assert np.abs(means[0] - means[1]).max() > 0.1  # c1 has other inputs than c0


@pytest.fixture(scope="module")
def digits_by_label():
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    data = x.reshape(len(x), 64).astype("float32") / 255, y
    return lp.split_clients(lp.partition(data, clients=8, shards=2))


@pytest.fixture(scope="module")
def personal_heads(digits_by_label):
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu")])
    model = lp.transfer_model(
        network, 10, pretrained=False, trainable="all", optimizer="sgd", learning_rate=RATE
    )
    federated = lp.FederatedAveraging(model, personal_layers="head", clients_per_round=5)
    federated.fit(digits_by_label[0], rounds=8, verbose=0)
    return federated


def test_each_client_is_evaluated_with_its_own_layers(personal_heads, digits_by_label):
    _, test = digits_by_label
    found = personal_heads.evaluate(test)
    accuracies = []
    for client, (x, y) in test.items():
        model = personal_heads.client_model(client)
        assert type(model).__module__.startswith("keras.")
        accuracies.append(np.mean(model.predict(x, verbose=0).argmax(-1) == y))
    np.testing.assert_allclose(found["mean_accuracy"], np.mean(accuracies), atol=1e-6)
    assert found["mean_accuracy"] > 0.8
    x, y = (np.concatenate(parts) for parts in zip(*test.values(), strict=True))
    untrained = np.mean(personal_heads.model.predict(x, verbose=0).argmax(-1) == y)
    assert untrained < 0.5  # nobody trained the head of the model


def test_other_ids_are_noticed(personal_heads, digits_by_label):
    _, test = digits_by_label
    others = {f"other {client}": data for client, data in list(test.items())[:2]}
    with pytest.warns(UserWarning, match="None of these clients has personal weights"):
        found = personal_heads.evaluate(others)
    assert found["clients"] == 2
    personal_heads.evaluate({**others, "client_0": test["client_0"]})


def test_a_client_without_a_round_has_no_model(personal_heads, digits_by_label):
    with pytest.raises(ValueError, match=r"after its first round\. Received: 'nobody'"):
        personal_heads.client_model("nobody")
    with pytest.raises(ValueError, match="in a federation with personal layers"):
        lp.FederatedAveraging(make()).client_model("c0")
    with pytest.raises(ValueError, match="whose clients have models of their own"):
        lp.personalize(personal_heads, *digits_by_label)
    x, y = next(iter(digits_by_label[1].values()))
    with pytest.raises(ValueError, match="each client has a model of its own"):
        personal_heads.fit(digits_by_label[0], 1, validation_data=(x, y))
    with pytest.raises(ValueError, match="heads that all clients share"):
        personal_heads.fit_head(digits_by_label[0])


class StopAfter(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


def test_training_goes_on_after_a_kill(tmp_path):
    def federation():
        model = make(normalization=True)
        return lp.FederatedAveraging(
            model, batch_size=4, clients_per_round=2, personal_layers="normalization"
        )

    whole = federation()
    whole.fit(CLIENTS, rounds=6, verbose=0)
    options = {"checkpoint_dir": tmp_path, "checkpoint_freq": 2, "verbose": 0}
    with pytest.raises(KeyboardInterrupt):
        federation().fit(CLIENTS, rounds=6, callbacks=StopAfter(4), **options)
    # Round 5 was begun after the checkpoint of round 4, and its personal weights are not used.
    assert [path for path in (tmp_path / "clients").iterdir() if path.suffix == ".0000005"]
    again = federation()
    again.fit(CLIENTS, rounds=6, **options)
    for one, other in zip(
        again.model.trainable_variables, whole.model.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for client in CLIENTS:
        np.testing.assert_allclose(
            again._personal.values(client), whole._personal.values(client), atol=1e-6
        )
    with pytest.raises(ValueError, match="personal_layers="):
        lp.FederatedAveraging(make(), personal_layers="head").fit(CLIENTS, 1, **options)


def test_a_client_with_a_bad_update_keeps_its_layers():
    federated = lp.FederatedAveraging(make(activation="relu"), personal_layers="head")
    federated.fit(CLIENTS, rounds=1, verbose=0)
    before = federated._personal.values("c1")
    x, y = CLIENTS["c1"]
    bad = {**CLIENTS, "c1": (np.full_like(x, 1e30), y)}
    with pytest.warns(UserWarning, match="not finite"):
        federated.fit(bad, rounds=1, verbose=0)
    np.testing.assert_array_equal(federated._personal.values("c1"), before)
    assert not np.array_equal(federated._personal.values("c0"), before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"compression": lp.Quantize(8)},
        {"compression": lp.TopK(0.5, error_feedback=True)},
        {"aggregation": "median"},
        {"proximal_strength": 0.1},
        {"privacy": lp.DifferentialPrivacy(noise_multiplier=0.5, clip=1.0, delta=1e-3, seed=0)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_with_other_arguments(arguments):
    model = make()
    federated = lp.FederatedAveraging(model, personal_layers="head", **arguments)
    before = [np.array(v) for v in model.trainable_variables]
    history = federated.fit(CLIENTS, rounds=2, verbose=0)
    shared, head = before[:2], before[2:]
    for old, new in zip(shared, model.trainable_variables[:2], strict=True):
        assert not np.allclose(old, new, atol=1e-6)
    for old, new in zip(head, model.trainable_variables[2:], strict=True):
        np.testing.assert_array_equal(old, new)
    assert len(history.history["update_norm"]) == 2
    known = [federated._personal.values(client) for client in CLIENTS]
    assert any(values is not None for values in known)


def test_the_proximal_term_is_about_shared_weights_only():
    """Far stronger than the loss, it holds the shared weights; the heads train as without it."""
    plain, held = make(), make()
    for model, strength in ((plain, 0), (held, 5.0)):
        lp_arguments = {"batch_size": None, "local_epochs": 1, "proximal_strength": strength}
        federated = lp.FederatedAveraging(model, personal_layers="head", **lp_arguments)
        federated.fit(CLIENTS, rounds=1, verbose=0)
        model.own = federated._personal.values("c0")
    # In a single step, the term is 0 at the start: nothing differs.
    np.testing.assert_allclose(plain.own, held.own, atol=1e-7)
    twice = []
    for strength in (0, 5.0):
        model = make()
        start = np.array(model.trainable_variables[0])
        federated = lp.FederatedAveraging(
            model, personal_layers="head", batch_size=None, local_epochs=20,
            proximal_strength=strength,
        )  # fmt: skip
        federated.fit({"c0": CLIENTS["c0"]}, rounds=1, verbose=0)
        own = federated._personal.values("c0") - Personal(make(), "head").values()
        twice.append((np.abs(model.trainable_variables[0] - start).max(), np.abs(own).max()))
    (moved, own), (held_back, own_with) = twice
    assert held_back < moved / 2
    assert own_with > 0.7 * own


def test_which_layers_are_personal():
    model = make(hidden_units=[4])
    heads = Personal(model, "head")
    assert [v.path.split("/")[-2] for v in heads.trainable] == [
        *("predictions_hidden_0",) * 2,
        *("predictions",) * 2,
    ]
    assert heads.merge(*heads.split(model.trainable_variables)) == tuple(model.trainable_variables)
    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4), keras.layers.Dense(3)])
    plain.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert Personal(plain, "head").trainable == plain.layers[-1].trainable_variables
    assert Personal(plain, None).shared == plain.trainable_variables
    several = lp.multitask_model(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]), {"a": 2, "b": 3},
        pretrained=False,
    )  # fmt: skip
    assert len(Personal(several, "head").trainable) == 4


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("heads", '"head", "normalization" or a list of layer names'),
        (["belwo"], "Received: 'belwo'. Did you mean 'below'?"),
        (["below", "predictions"], "Some trainable layers must be shared"),
        ("normalization", "must have trainable weights"),
        ([3], "a list of layer names"),
    ],
)
def test_wrong_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        lp.FederatedAveraging(make(), personal_layers=layers)


def test_shared_batch_normalization_is_refused():
    with pytest.raises(ValueError, match='clients with personal_layers="normalization"'):
        lp.FederatedAveraging(make(normalization=True), personal_layers="head")


def test_the_store_keeps_what_a_checkpoint_may_need(tmp_path):
    store = ClientStore()
    store.open(tmp_path, 0)
    assert store.read("a") is None
    for round_number in range(1, 7):
        values = np.full(3, round_number, "float32")
        store.write("a", values, round_number, earliest=max(0, round_number - 3))
    store.write("b", np.zeros(1, "float32"), 2, earliest=2)
    # Round 3 for the checkpoint of round 3, and the later ones.
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [
        *(".0000002", ".0000003", ".0000004", ".0000005", ".0000006"),
    ]
    assert store.read("a").tolist() == [6, 6, 6]
    (tmp_path / "x.partial").touch()
    (tmp_path / ".DS_Store").touch()
    again = ClientStore()
    again.open(tmp_path, 4)
    assert again.read("a").tolist() == [4, 4, 4]
    assert again.read("b").tolist() == [0]
    assert not list(tmp_path.glob("*.partial"))
    path = max(tmp_path.glob("*.0000004"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"0000004, which is damaged\. Delete it: client 'a'"):
        again.read("a")
    path.unlink()
    assert again.read("a").tolist() == [3, 3, 3]


def test_files_of_checkpoints_stay_as_they_are_without_checkpoints(tmp_path):
    store = ClientStore()
    store.open(tmp_path, 0)
    store.write("a", np.ones(2, "float32"), 5, earliest=5)
    store.open(None, 5)
    store.write("a", np.zeros(2, "float32"), 6, earliest=5)
    assert store.read("a").tolist() == [0, 0]
    again = ClientStore()
    again.open(tmp_path, 5)
    assert again.read("a").tolist() == [1, 1]


def test_equal_ids_have_the_same_file(tmp_path):
    store = ClientStore()
    store.open(tmp_path, 0)
    for i, (one, other) in enumerate([(np.int64(3), 3), ((np.int32(1), "x"), (1, "x"))]):
        store.write(one, np.full(1, i, "float32"), 1, earliest=1)
        assert store.read(other).tolist() == [i]
    assert store.read("3") is None


def test_the_momentum_is_that_of_each_fit(monkeypatch):
    """A longer `fit` remembers more steps, so its rounds are computed by another process."""
    model, momenta = make(normalization=True), []
    federated = lp.FederatedAveraging(model, batch_size=None, personal_layers="normalization")
    layer = model.get_layer(index=1).get_layer("statistics")
    run = federated._rounds.run

    def recorded(*arguments):
        momenta.append(layer.momentum)
        return run(*arguments)

    monkeypatch.setattr(federated._rounds, "run", recorded)
    federated.fit(CLIENTS, rounds=1, verbose=0)
    first = federated._rounds._training.process
    mean = federated._personal.of_client("c0")[1][2]
    federated.fit(CLIENTS, rounds=50, callbacks=StopTraining(), verbose=0)
    assert momenta == [0.5, 0.8]
    assert federated._rounds._training.process is not first
    moved = federated._personal.of_client("c0")[1][2]
    x, _ = CLIENTS["c0"]
    batch = model.get_layer(index=1).get_layer("below")(x).numpy().mean(0)
    # The shared layer moves a little in a round; the old mean counts 0.8, not 0.5.
    assert np.linalg.norm(moved - (0.8 * mean + 0.2 * batch)) < np.linalg.norm(
        moved - (0.5 * mean + 0.5 * batch)
    )


class StopTraining(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


def test_the_model_of_a_client_of_any_federation():
    plain = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4), keras.layers.Dense(3, name="last")]
    )
    plain.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    adapted = lp.finetune_model(make(), lora=lp.LoRA(rank=2), optimizer="sgd")
    for model, layer in ((plain, "last"), (adapted, "predictions")):
        federated = lp.FederatedAveraging(model, personal_layers="head")
        federated.fit(CLIENTS, rounds=1, verbose=0)
        copy = federated.client_model("c1")
        variables, values = federated._personal.of_client("c1")
        for own, value in zip(copy.get_layer(layer).trainable_variables, values, strict=True):
            np.testing.assert_array_equal(own, value)
        kernel = model.get_layer(layer).kernel
        assert not np.array_equal(kernel, values[0])
        x, _ = CLIENTS["c1"]
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        np.testing.assert_allclose(
            copy.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6
        )


def test_a_store_moves_from_its_temporary_folder(tmp_path):
    store = ClientStore()
    store.write((1, "x"), np.ones(2, "float32"), 1, earliest=1)
    store.open(tmp_path / "clients", 1)
    assert store.read((1, "x")).tolist() == [1, 1]
    assert len(list((tmp_path / "clients").iterdir())) == 1


def test_layers_that_change_are_refused():
    model = make(hidden_units=[4])
    federated = lp.FederatedAveraging(model, personal_layers="head")
    federated.fit(CLIENTS, rounds=1, verbose=0)
    model.get_layer("predictions").trainable = False
    model.compile(model.optimizer, model.loss)
    with pytest.raises(ValueError, match="clients that keep values must stay the same"):
        federated.fit(CLIENTS, rounds=1, verbose=0)
