"""DP-FedAvg against NumPy: what is clipped, what noise is added, what is withheld and counted."""

import json

import keras
import numpy as np
import pytest
from scipy.stats import binomtest, chi2

import keras_lp as lp
from keras_lp.federated.clients.source import Source
from keras_lp.federated.engine import installation
from keras_lp.federated.engine.rounds import PrivateRound
from keras_lp.federated.private import PrivateClients
from keras_lp.utils.progress import Progress

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)

RATE = 0.05
_rng = np.random.default_rng(7)
CLIENTS = {
    f"c{i:02}": (
        _rng.normal(size=(n, 3)).astype("float32"),
        _rng.normal(size=n).astype("float32"),
    )
    for i, n in enumerate(_rng.integers(1, 12, 40))
}
START = np.array([0.5, -1.0, 2.0, 0.1])  # three weights and a bias


def make(rate=RATE):
    layer = keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Reshape(())])
    layer.set_weights([START[:3, None], START[3:]])
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


def federation(model=None, clients_per_round=10, **kwargs):
    kwargs = {"delta": 1e-3, "noise_multiplier": 0.5, "clip": 0.3, "seed": 0, **kwargs}
    return lp.FederatedAveraging(
        model or make(),
        clients_per_round=clients_per_round,
        batch_size=None,
        privacy=lp.DifferentialPrivacy(**kwargs),
    )


def flat(model):
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


def update(x, y, w=START):
    """The update of one step on a client."""
    x = np.column_stack([x, np.ones(len(x))]).astype("float64")
    return -RATE * 2 * x.T @ (x @ w - y) / len(x)


def clipped(one, clip):
    return one * min(1, clip / np.linalg.norm(one))


def run_round(clients, clip, expected=10, counts=True, noise=None):
    """Runs one round without sampling; returns the change of the weights and `within`."""
    model = make()
    federated = lp.FederatedAveraging(model, batch_size=None)
    shapes = [weight.shape for weight in model.get_weights()]
    noise, rng = noise or [np.zeros(shape, "float32") for shape in shapes], np.random.default_rng(0)
    private = PrivateRound(clip, noise, expected, max(12, len(clients)), counts, rng)
    with Source(model, clients) as source:
        progress = Progress("", len(clients), 0)
        logs = federated._rounds.run(source, source.ids, rng, progress, private)
    return flat(model) - START, logs["within"]


def test_each_update_is_clipped_as_one_vector_also_inside_a_block():
    clients = {**CLIENTS, "huge": (1e6 * CLIENTS["c00"][0], CLIENTS["c00"][1])}
    updates = [update(*data) for data in clients.values()]
    norms = np.array([np.linalg.norm(one) for one in updates])
    clip = 1.01 * float(np.median(norms))
    change, within = run_round(clients, clip, expected=50)
    expected = sum(clipped(one, clip) for one in updates) / 50
    np.testing.assert_allclose(change, expected, atol=1e-6)
    assert within == (norms <= clip).sum()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e8, np.inf])
def test_a_client_more_or_less_moves_the_sum_by_at_most_the_clip(size):
    x, y = CLIENTS["c00"]
    # "inf" overflows: the update is not finite
    planted = (np.full_like(x, 3e38 if np.isinf(size) else size), y)
    few = dict(list(CLIENTS.items())[:8])
    without, _ = run_round(few, 0.2)
    change, _ = run_round({**few, "planted": planted}, 0.2)
    moved = 10 * np.linalg.norm(change - without)
    assert moved <= 0.2 + 1e-5
    assert moved == pytest.approx(0.0 if np.isinf(size) else 0.2, abs=1e-5)


def test_nobody_sampled_releases_the_noise_alone():
    noise = [np.full((3, 1), 2.0, "float32"), np.full(1, -1.0, "float32")]
    change, within = run_round({"c00": CLIENTS["c00"]}, 0.3, counts=False, noise=noise)
    np.testing.assert_allclose(change, [-0.2, -0.2, -0.2, 0.1], atol=1e-6)
    assert within == 0


class Weights(keras.callbacks.Callback):
    """Keeps the weights after each round."""

    def on_train_begin(self, logs=None):
        self.found = [flat(self.model)]

    def on_epoch_end(self, epoch, logs=None):
        self.found.append(flat(self.model))


def test_the_noise_of_many_rounds_has_the_promised_deviation():
    model, weights = make(rate=0.0), Weights()
    federation(model, seed=None).fit(CLIENTS, 60, callbacks=weights, verbose=0)
    noise = np.diff(weights.found, axis=0).ravel()  # no client moves the weights
    statistic = np.sum((noise / (0.5 * 0.3 / 10)) ** 2)
    low, high = chi2.ppf([1e-7, 1 - 1e-7], len(noise))
    assert low < statistic < high


def test_metrics_are_withheld_and_the_budget_is_in_the_history():
    federated = federation(clip="adaptive", noise_multiplier=0.8, seed=None)
    x, y = CLIENTS["c01"]
    history = federated.fit(CLIENTS, 3, validation_data=(x, y), verbose=0).history
    assert set(history) == {
        *("epsilon", "clip", "clients", "update_norm", "bytes_up", "bytes_down", "seconds"),
        "val_loss",
    }
    assert history["clients"] == [10] * 3  # expected
    assert history["clip"][0] == 0.1
    assert history["clip"][1] != 0.1
    assert history["epsilon"] == sorted(history["epsilon"])
    assert history["epsilon"][-1] == federated.privacy_report().epsilon


def test_epsilon_chooses_the_noise_and_training_stops_before_the_budget(capsys):
    federated = federation(epsilon=2.0, noise_multiplier=None)
    history = federated.fit(CLIENTS, 4, verbose=0).history
    assert 1.9 < history["epsilon"][-1] <= 2
    weights = flat(federated.model)
    with pytest.raises(ValueError, match=r"Another round would pass.*epsilon=2.0, of which 1\.9"):
        federated.fit(CLIENTS, 1, verbose=0)
    np.testing.assert_array_equal(flat(federated.model), weights)
    given = federation(epsilon=2.0, noise_multiplier=federated.privacy_report().noise_multiplier)
    assert len(given.fit(CLIENTS, 9, verbose=1).epoch) == 4
    assert "Training stops after round 4: the privacy budget is spent." in capsys.readouterr().out


def test_a_seed_repeats_a_run_and_none_does_not():
    runs = {}
    for seed in (0, None):
        for i in range(2):
            federated = federation(seed=seed)
            federated.fit(CLIENTS, 2, verbose=0)
            runs[seed, i] = flat(federated.model)
    np.testing.assert_array_equal(runs[0, 0], runs[0, 1])
    assert not np.array_equal(runs[None, 0], runs[None, 1])


def test_a_resumed_training_continues_the_account(tmp_path):
    whole = federation(clip="adaptive")
    whole.fit(CLIENTS, 4, verbose=0)
    part = federation(clip="adaptive")
    part.fit(CLIENTS, 2, checkpoint_dir=tmp_path, verbose=0)
    again = federation(clip="adaptive")
    again.fit(CLIENTS, 2, checkpoint_dir=tmp_path, verbose=0)  # finished before
    assert again.privacy_report() == part.privacy_report()
    history = again.fit(CLIENTS, 2, checkpoint_dir=tmp_path, verbose=0).history
    assert again.privacy_report() == whole.privacy_report()
    assert history["epsilon"] == whole.model.history.history["epsilon"][2:]
    np.testing.assert_array_equal(flat(again.model), flat(whole.model))


def test_a_round_that_was_begun_and_lost_counts(tmp_path):
    federation().fit(CLIENTS, 2, checkpoint_dir=tmp_path, verbose=0)
    ledger = tmp_path / "privacy.json"
    found = json.loads(ledger.read_text())
    assert found["releases"] == 2
    ledger.write_text(json.dumps({**found, "releases": 3}))  # killed in the third round
    again = federation()
    again.fit(CLIENTS, 2, checkpoint_dir=tmp_path, verbose=0)
    again.fit(CLIENTS, 1, checkpoint_dir=tmp_path, verbose=0)
    assert again.rounds_done == 3
    assert again.privacy_report().releases == 4
    with pytest.raises(ValueError, match="privacy="):
        federation(clip=0.4).fit(CLIENTS, 2, checkpoint_dir=tmp_path, verbose=0)


def test_rounds_lost_before_the_first_checkpoint_count_with_their_noise(tmp_path):
    settings = {"epsilon": 8.0, "noise_multiplier": None}
    federation(**settings).fit(CLIENTS, 3, checkpoint_dir=tmp_path, checkpoint_freq=100, verbose=0)
    for path in tmp_path.glob("round_*"):
        path.unlink()
    again = federation(**settings)  # more rounds would mean more noise
    with pytest.raises(ValueError, match=r"epsilon=8.0, of which 7\.9.* spent after 3 rounds"):
        again.fit(CLIENTS, 100, checkpoint_dir=tmp_path, verbose=0)
    other = federation(epsilon=9.0, noise_multiplier=None)
    with pytest.raises(ValueError, match=r"written with other \['settings'\]"):
        other.fit(CLIENTS, 3, checkpoint_dir=tmp_path, verbose=0)
    begun = federation(**settings)
    begun.fit(CLIENTS, 5, verbose=0, callbacks=StopAfter(1))
    with pytest.raises(ValueError, match=r"other \['noise_multiplier'\]"):
        begun.fit(CLIENTS, 1, checkpoint_dir=tmp_path, verbose=0)


class StopAfter(keras.callbacks.Callback):
    def __init__(self, rounds):
        super().__init__()
        self.rounds = rounds

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 >= self.rounds


def test_random_numbers_of_clients_are_secret():
    for seed, same in ((0, True), (None, False)):
        draws = []
        for _ in range(2):
            private = PrivateClients(
                lp.DifferentialPrivacy(noise_multiplier=1, delta=1e-3, seed=seed), None
            )
            private.begin(make(), 40, 1)
            draws.append(private.next_round(list(CLIENTS), [(3,)])[1].random.random(3))
        assert np.array_equal(*draws) == same


def test_private_clients_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 3)).astype("float32")
    y = (x @ [1.0, -2.0, 0.5] + 1).astype("float32")
    model = make()
    before = model.evaluate(x, y, verbose=0)
    federated = lp.FederatedAveraging(
        model,
        clients_per_round=300,
        local_epochs=5,
        privacy=lp.DifferentialPrivacy(epsilon=4, delta=1e-4, seed=0),
    )
    federated.fit(lp.partition((x, y), 1000), 30, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.05 * before


def test_what_cannot_be_private_is_refused(mlp, digits):
    private = lp.DifferentialPrivacy(noise_multiplier=1, delta=1e-3, clip=1.0)
    with pytest.raises(ValueError, match="all clients must count alike"):
        lp.FederatedAveraging(make(), weighting="examples", privacy=private)
    with pytest.raises(ValueError, match="`delta` must be below 1 / clients"):
        federation(delta=0.5).fit(CLIENTS, 1)
    with pytest.raises(ValueError, match="must allow a round"):
        federation(epsilon=0.01).fit(CLIENTS, 1)
    half = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, dtype="bfloat16")])
    half.compile("sgd", "mse")
    with pytest.raises(ValueError, match="with half precision"):
        federation(half).fit(CLIENTS, 1)
    with pytest.raises(ValueError, match="needs a federation with differential privacy"):
        lp.FederatedAveraging(make()).privacy_report()
    with pytest.raises(ValueError, match="a federation that has begun"):
        federation().privacy_report()
    federated = federation()
    federated.fit(CLIENTS, 1, verbose=0)
    with pytest.raises(ValueError, match="Received: 12 clients, before 40"):
        federated.fit(dict(list(CLIENTS.items())[:12]), 1)
    model = lp.transfer_model(
        mlp(), lp.Classification(10, class_weight="balanced"), optimizer="sgd"
    )
    clients = lp.partition(digits, 20)
    with pytest.raises(ValueError, match="counts the labels of the clients"):
        lp.FederatedAveraging(model, privacy=private).fit(clients, 1)
    with pytest.raises(ValueError, match="are exact, without noise"):
        lp.FederatedAveraging(model, privacy=private).fit_head(clients)


def test_statistics_of_features_are_not_sent(mlp, digits):
    model = lp.transfer_model(mlp(), 10, optimizer="sgd")
    federated = lp.FederatedAveraging(
        model, privacy=lp.DifferentialPrivacy(noise_multiplier=1, delta=1e-3, clip=1.0)
    )
    federated.fit(lp.partition(digits, 20), 1, verbose=0)
    (head,) = [layer for layer in model.layers if layer.name == "predictions"]
    np.testing.assert_array_equal(head.input_scale, np.ones(16))


def outcomes(noise, sample, planted, trials):
    """What an attacker sees of a client in whole federations of one round: a projection."""
    clients = dict(list(CLIENTS.items())[:7])
    x = np.full((1, 3), 2.0, "float32")
    nothing = x @ START[:3].astype("float32") + np.float32(START[3])  # an update of 0
    clients["planted"] = x, nothing + np.float32(50 * planted)
    direction = clipped(update(*clients["planted"]), 1) if planted else None
    model, found = make(), []
    private = federation(
        model, sample, noise_multiplier=noise, delta=1e-2, accountant="rdp", seed=int(planted)
    )
    for _ in range(trials):
        model.layers[0].set_weights([START[:3, None], START[3:]])
        private.fit(clients, rounds=1, verbose=0)
        found.append(flat(model) - START)
        if len(found) == 1:
            epsilon = private.privacy_report().epsilon
    return np.array(found), direction, epsilon


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "sample", "trials"), [(0.7, 4, 500), (0.3, 8, 100)])
def test_an_attacker_of_whole_federations_is_no_better_than_epsilon_allows(noise, sample, trials):
    there, direction, epsilon = outcomes(noise, sample, True, trials)
    absent, _, same = outcomes(noise, sample, False, trials)
    assert epsilon == same
    scores, others = there @ direction, absent @ direction
    grid = np.quantile(np.r_[scores[::2], others[::2]], np.linspace(0.02, 0.98, 49))
    share = [[np.mean(one[::2] > t) for t in grid] for one in (scores, others)]
    best = grid[np.argmax(np.log(np.add(share[0], 0.01) / np.add(share[1], 0.01)))]
    caught, false = (int((one[1::2] > best).sum()) for one in (scores, others))
    low = binomtest(caught, trials // 2).proportion_ci(0.95).low
    high = binomtest(false, trials // 2).proportion_ci(0.95).high
    bound = np.log(max(low - 1e-2, 1e-9) / high)
    assert bound <= epsilon
    if sample == 8:  # hardly protected: the attack works
        assert bound > 1
