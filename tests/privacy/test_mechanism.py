"""Noise, samples, adaptive clipping and the report of the Gaussian mechanism."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.stats import beta, chi2, kstest

import keras_lp as lp
from keras_lp.privacy.mechanism import Mechanism
from keras_lp.privacy.randomness import SecureRandomness


def mechanism(population=1000, sample=100, releases=50, unit="client", **kwargs):
    kwargs = {"delta": 1e-4, "noise_multiplier": 1.0, **kwargs}
    return Mechanism(lp.DifferentialPrivacy(**kwargs), unit, population, sample, releases)


def test_secure_random_numbers_have_their_distributions():
    random = SecureRandomness()
    assert kstest(random.random(20_001), "uniform").pvalue > 1e-6
    normal = random.standard_normal((3, 6667))
    assert normal.shape == (3, 6667)
    assert kstest(normal.ravel(), "norm").pvalue > 1e-6
    assert not np.array_equal(random.random(5), random.random(5))
    assert random.standard_normal((0,)).shape == (0,)


@pytest.mark.parametrize("clip", [0.5, "adaptive"])
def test_the_noise_has_the_promised_deviation(clip):
    known = mechanism(clip=clip)
    known.start()
    noise = np.concatenate([part.ravel() for part in known.noise([(40, 250), (), (7,)])])
    # Andrew et al., 2021, theorem 1: the count takes a part of the noise.
    multiplier = 1.0 if clip == 0.5 else (1.0 - (2 * 100 / 20) ** -2) ** -0.5
    statistic = np.sum((noise / (multiplier * known.clip)) ** 2)
    low, high = chi2.ppf([1e-7, 1 - 1e-7], len(noise))
    assert low < statistic < high


def test_samples():
    known = mechanism(population=50, sample=5, delta=1e-3, clip=1.0, seed=3)
    counts, sizes = np.zeros(50), []
    for _ in range(400):
        known.start()
        chosen = known.sample()
        assert len(set(chosen)) == len(chosen)
        counts[chosen] += 1
        sizes.append(len(chosen))
    assert abs(counts - 40).max() < 6 * math.sqrt(400 * 0.1 * 0.9)
    assert np.var(sizes) == pytest.approx(50 * 0.1 * 0.9, rel=0.3)
    fixed = mechanism(population=50, sample=5, delta=1e-3, clip=1.0, sampling="fixed")
    fixed.start()
    assert len({*fixed.sample()}) == 5
    everyone = mechanism(population=50, sample=50, delta=1e-3)
    assert everyone.sample().tolist() == list(range(50))


def test_a_seed_repeats_a_release_and_no_seed_does_not():
    for seed, same in ((1, True), (None, False)):
        runs = [mechanism(seed=seed) for _ in range(2)]
        for run in runs:
            run.start()
        first, second = (run.noise([(5,)])[0] for run in runs)
        assert np.array_equal(first, second) == same
    run = mechanism(seed=1)
    draws = []
    for _ in range(2):
        run.start()
        draws.append(run.noise([(5,)])[0])
    assert not np.array_equal(*draws)


def test_an_adaptive_norm_finds_the_median():
    norms = np.random.default_rng(0).lognormal(1.0, 0.5, 1000)
    known = mechanism(seed=0)
    for _ in range(200):
        known.start()
        chosen = known.sample()
        known.adapt(int((norms[chosen] <= known.clip).sum()), len(chosen))
    assert known.clip == pytest.approx(np.median(norms), rel=0.15)


def test_one_step_of_the_adaptive_norm_by_hand():
    known = mechanism(seed=5, noise_multiplier=2.0)
    known.start()
    noise = 5.0 * np.random.default_rng((5, 1, 3)).standard_normal((1,))[0]
    known.adapt(30, 104)
    share = (30 - 52 + noise) / 100 + 0.5
    assert known.clip == pytest.approx(0.1 * math.exp(-0.2 * (share - 0.5)))


def test_the_budget_and_the_state():
    known = mechanism(noise_multiplier=None, epsilon=2.0, releases=10)
    for _ in range(10):
        assert known.allows()
        known.start()
    assert not known.allows()
    assert 1.9 < known.epsilon() <= 2
    other = mechanism(noise_multiplier=None, epsilon=2.0, releases=99)
    other.restore(known.state())
    assert other.epsilon() == known.epsilon()
    other.restore({**known.state(), "releases": 3})  # older
    assert other.releases == 10


def test_the_report_says_what_holds():
    known = mechanism(epsilon=3)
    known.start()
    text = str(known.report())
    for line in ("each client: one more or less of 1,000", " of 3", "each with probability 0.1"):
        assert line in text
    assert "NOTHING IS PROTECTED" not in text
    seeded = mechanism(unit="example", seed=0, sampling="fixed").report()
    assert "NOTHING IS PROTECTED from whoever knows the seed" in str(seeded)
    assert "each example: one replaced of 1,000" in str(seeded)
    assert "100 without replacement" in str(seeded)
    assert "Canonne" in str(seeded)
    assert max(map(len, str(seeded).splitlines())) <= 100


@pytest.mark.parametrize(("population", "sample", "noise"), [(20, 20, 1.5), (60, 12, 0.5)])
def test_an_attacker_is_no_better_than_epsilon_allows(population, sample, noise):
    """Tells two neighbouring populations apart, of which one has a client more."""
    trials, releases = 4000, 5
    settings = {"clip": 1.0, "delta": 1e-3, "noise_multiplier": noise}
    sums = np.zeros((2, trials))
    for trial in range(trials):
        for world in range(2):
            known = mechanism(population, sample, releases, **settings)
            for _ in range(releases):
                known.start()
                takes_part = 0 in known.sample()
                sums[world, trial] += known.noise([(1,)])[0][0] + world * takes_part
    epsilon = mechanism(population, sample, **settings).account.epsilon(releases)
    bound = 0.0
    for threshold in np.quantile(sums, np.linspace(0.02, 0.98, 25)):
        for above in (True, False):
            guess = (sums > threshold) == above
            hits, alarms = guess[1].sum(), guess[0].sum()
            # intervals of Clopper and Pearson, at a level for all 50 thresholds together
            true_rate = beta.ppf(2e-4, hits, trials - hits + 1) if hits else 0.0
            false_rate = beta.ppf(1 - 2e-4, alarms + 1, trials - alarms)
            if true_rate > 1e-3:
                bound = max(bound, math.log((true_rate - 1e-3) / false_rate))
    assert 0.15 * epsilon < bound < epsilon


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`epsilon` or `noise_multiplier` must be given"),
        ({"epsilon": 0}, "`epsilon` must be a number above 0"),
        ({"epsilon": 1, "delta": 1}, "`delta` must be below 1"),
        ({"epsilon": 1, "clip": -1}, "`clip` must be a number above 0"),
        ({"epsilon": 1, "sampling": "posson"}, "Did you mean 'poisson'"),
        ({"epsilon": 1, "sampling": "fixed", "accountant": "pld"}, 'Pass accountant="rdp"'),
        ({"epsilon": 1, "seed": "a"}, "`seed` must be None or an integer"),
        ({"epsilon": 1, "seed": -1}, "`seed` must be None or an integer of 0 or more"),
        ({"epsilon": math.inf}, "`epsilon` must be finite"),
        ({"epsilon": 1, "clip": math.inf}, "`clip` must be finite"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.DifferentialPrivacy(**{"delta": 1e-3, **arguments})


def test_settings_of_numpy_can_be_written():
    given = lp.DifferentialPrivacy(
        delta=np.float32(0.01), epsilon=np.float32(8), clip=np.int64(1), seed=np.int64(3)
    )
    json.dumps(dataclasses.asdict(given))


def test_settings_that_do_not_fit_the_population():
    with pytest.raises(
        ValueError, match=r"delta=0.01 for 1000 clients. Pass a delta below 1.0e-03"
    ):
        mechanism(delta=0.01)
    with pytest.raises(ValueError, match=r"Received: a noise multiplier of 2 for 10 clients"):
        mechanism(sample=10, noise_multiplier=2.0)
