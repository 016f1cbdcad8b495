"""Membership attacks against scikit-learn and NumPy, on models that remember and that do not."""

import keras
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

import keras_lp as lp
from keras_lp.audit import membership


@pytest.fixture(scope="module")
def pool():
    """Two halves with random labels, which can only be remembered."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 30)).astype("float32")
    y = rng.integers(0, 2, 400)
    return (x[:200], y[:200]), (x[200:], y[200:])


def train(x, y, privacy=None):
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((30,)), keras.layers.Dense(200, "relu")])
    model = lp.transfer_model(backbone, 2)
    lp.fit_head(model, (x, y), l2=1e-6, privacy=privacy, verbose=0)
    return model


def test_a_model_that_remembers_reveals_its_members(pool):
    found = lp.audit_membership(train(*pool[0]), *pool, train=train, shadow_models=6, verbose=0)
    loss, ratio = (found.results[name] for name in ("loss threshold", "likelihood ratio"))
    assert loss.auc_interval[0] > 0.55
    assert ratio.auc_interval[0] > 0.6
    assert "reveals who was in its training data (loss threshold" in found.verdict
    assert "200 members and 200 others" in str(found)


def test_a_model_that_never_saw_them_does_not(pool):
    rng = np.random.default_rng(5)
    model = train(rng.normal(size=(200, 30)).astype("float32"), rng.integers(0, 2, 200))
    found = lp.audit_membership(model, *pool, verbose=0)
    assert list(found.results) == ["loss threshold"]
    low, high = found.results["loss threshold"].auc_interval
    assert low < 0.5 < high
    assert high - low < 0.13
    assert found.verdict == (
        "These attacks do not tell members from others. A stronger one may.\n"
        "The likelihood ratio, a stronger attack, was not tried: it needs `train`."
    )


def test_differential_privacy_hides_members(pool):
    def audited(privacy):
        found = lp.audit_membership(train(*pool[0], privacy), *pool, verbose=0)
        return found.results["loss threshold"].auc

    assert audited(None) > 0.65
    assert audited(lp.DifferentialPrivacy(epsilon=1, delta=1e-3, clip=1.0, seed=0)) < 0.58


@pytest.mark.parametrize("seed", range(3))
def test_the_area_and_its_interval(seed):
    rng = np.random.default_rng(seed)
    members, others = rng.integers(0, 20, 60) + 2, rng.integers(0, 20, 45)  # with ties
    area, (low, high) = membership.auc(members, others)
    truth = np.r_[np.ones(60), np.zeros(45)]
    np.testing.assert_allclose(area, roc_auc_score(truth, np.r_[members, others]))
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    deviation = np.sqrt(wins.mean(1).var(ddof=1) / 60 + wins.mean(0).var(ddof=1) / 45)
    np.testing.assert_allclose(
        [low, high], [area - 1.959964 * deviation, area + 1.959964 * deviation]
    )


def test_true_positives_at_one_percent():
    others = np.arange(200.0)  # two of them may be taken for members: those from 198
    members = np.r_[np.full(30, 197.5), np.full(10, 198.0), np.full(60, 0.0)]
    result = membership._result(np.r_[members, others], np.arange(300) < 100)
    assert result.true_positives == 0.4
    expected = stats.binomtest(40, 100).proportion_ci(method="exact")
    np.testing.assert_allclose(result.true_positives_interval, [expected.low, expected.high])
    assert result.tells


def test_which_attacks_are_better_than_guessing():
    def tells(found):
        """Of 100 members, some have the highest score, as 2 of 200 others; the rest are alike."""
        members = np.r_[np.full(found, 300.0), np.linspace(0, 195, 100 - found)]
        others = np.r_[np.full(2, 299.0), np.linspace(0, 195, 198)]
        return membership._result(np.r_[members, others], np.arange(300) < 100)

    for found, better in {2: False, 5: False, 9: True}.items():
        result = tells(found)
        assert result.true_positives == found / 100
        assert result.auc_interval[0] < 0.5
        assert result.tells == better
        p = stats.hypergeom.sf(found - 1, 300, 2 + found, 100)
        assert better == (p < 0.025)


def test_each_example_is_in_half_of_the_shadow_models():
    inside = membership.halves(101, 6, seed=3)
    assert inside.shape == (6, 101)
    assert (inside.sum(0) == 3).all()
    assert set(inside.sum(1)) == {50, 51}
    np.testing.assert_array_equal(inside, membership.halves(101, 6, seed=3))
    assert not np.array_equal(inside, membership.halves(101, 6, seed=4))


def test_likelihood_ratios_by_hand():
    inside = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], bool)
    shadows = np.array([[3.0, 0.0], [1.0, 5.0], [5.0, 2.0], [0.0, 4.0]])
    own = np.array([2.0, 4.5])
    # Inside: means 4 and 4.5, squares 2 and 0.5. Outside: means 0.5 and 1, squares 0.5 and 2.
    deviation = np.sqrt(2.5 / 2)
    expected = stats.norm.logpdf(own, [4, 4.5], deviation) - stats.norm.logpdf(
        own, [0.5, 1], deviation
    )
    np.testing.assert_allclose(membership.likelihood_ratios(own, shadows, inside), expected)


def test_confidences_are_logits_of_probabilities(pool, digits):
    x, y = digits
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(16, "relu")])
    model = lp.transfer_model(backbone, 10)
    lp.fit_head(model, digits, verbose=0)
    odds = np.exp(model.predict(x, verbose=0).astype("float64"))
    p = (odds / odds.sum(1, keepdims=True))[np.arange(len(y)), y]
    np.testing.assert_allclose(
        membership.confidences(model, x, y), np.log(p / (1 - p)), rtol=1e-3, atol=1e-3
    )


def test_the_loss_is_without_penalties_and_of_all_tasks(digits):
    x, y = digits
    layer = keras.layers.Dense(16, "relu", kernel_regularizer=keras.regularizers.L2(0.1))
    backbone = keras.Sequential([keras.Input((64,)), layer])
    model = lp.multitask_model(backbone, {"digit": 10, "even": 2})
    labels = {"digit": y, "even": y % 2}
    losses = 0
    for name, output in model.predict(x, verbose=0).items():
        odds = np.exp(output.astype("float64"))
        losses = losses - np.log((odds / odds.sum(1, keepdims=True))[np.arange(200), labels[name]])
    expected = -losses - np.log(1 - np.exp(-losses))
    found = membership.confidences(model, x, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    audit = lp.audit_membership(
        model,
        (x[:100], {name: one[:100] for name, one in labels.items()}),
        (x[100:], {name: one[100:] for name, one in labels.items()}),
    )
    assert audit.members == audit.others == 100


def test_wrong_input(pool):
    model = train(*pool[0])
    with pytest.raises(ValueError, match="`shadow_models` must be even"):
        lp.audit_membership(model, *pool, shadow_models=3)
    with pytest.raises(ValueError, match="`others` must have at least 100 examples"):
        lp.audit_membership(model, pool[0], (pool[1][0][:9], pool[1][1][:9]))
    for labels in (np.r_[np.full(30, -1), pool[0][1][30:]], np.full(200, -1)):
        with pytest.raises(ValueError, match="missing labels of the task 'predictions'"):
            lp.audit_membership(model, (pool[0][0], labels), pool[1])
    with pytest.raises(TypeError, match="`train` must return a model"):
        lp.audit_membership(model, *pool, train=lambda x, y: "model", verbose=0)
    lists = [tuple(part.tolist() for part in data) for data in pool]
    assert lp.audit_membership(model, *lists).members == 200
    plain = keras.Sequential([keras.Input((30,)), keras.layers.Dense(4)])
    plain.compile("sgd", keras.losses.CosineSimilarity())
    targets = [(x, np.random.default_rng(0).normal(size=(200, 4))) for x, _ in pool]
    inputs = keras.Input((30,))
    listed = keras.Model(inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(2)(inputs)])
    listed.compile("sgd", ["mse", "mse"])
    with pytest.raises(ValueError, match="outputs of a model with several tasks must be a dict"):
        lp.audit_membership(listed, *pool)
    with pytest.raises(ValueError, match="The loss must be 0 or more"):
        lp.audit_membership(plain, *targets)
    with pytest.raises(ValueError, match=r"as many labels as inputs. Received: \[100, 200\]"):
        lp.audit_membership(model, (pool[0][0], pool[0][1][:100]), pool[1])
    with pytest.raises(ValueError, match="`members` must be a pair"):
        lp.audit_membership(model, pool[0][0], pool[1])
    with pytest.raises(ValueError, match="needs a compiled Keras model"):
        lp.audit_membership("model", *pool)
    x = pool[0][0].copy()
    x[0] = np.nan
    with pytest.raises(ValueError, match="loss of each example must be finite"):
        lp.audit_membership(model, (x, pool[0][1]), pool[1])
