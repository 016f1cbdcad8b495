"""The account against published values, closed forms and other accountants."""

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from keras_lp.privacy.accounting import Account, noise_for


def account(noise=1.0, population=100, sample=10, delta=1e-3, accountant="pld", **kwargs):
    sampling = kwargs.get("sampling", "poisson")
    return Account(noise, population, sample, sampling, accountant, delta)


@pytest.mark.parametrize(
    ("population", "sample", "noise", "rounds", "delta", "epsilon"),
    [
        (3383, 120, 1.2, 100, 1e-5, 1.99),  # federated EMNIST in TFF's tutorial
        (100, 10, 1.0, 50, 1e-3, 4.02),
    ],
)
def test_published_values(population, sample, noise, rounds, delta, epsilon):
    rdp = account(noise, population, sample, delta, "rdp").epsilon(rounds)
    assert rdp == pytest.approx(epsilon, rel=0.01)
    assert 0.7 * rdp < account(noise, population, sample, delta).epsilon(rounds) < rdp


def gaussian_epsilon(noise, rounds, delta):
    """Balle and Wang, 2018 (arXiv:1805.06530), theorem 8, for several releases of everyone."""
    mu = math.sqrt(rounds) / noise

    def excess(epsilon):
        first = norm.cdf(mu / 2 - epsilon / mu)
        return first - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(excess, 0, 50)


@settings(max_examples=20, deadline=None)
@given(st.floats(2, 20), st.integers(1, 50), st.sampled_from([1e-3, 1e-5]))
def test_without_sampling_it_is_the_closed_form(noise, rounds, delta):
    exact = gaussian_epsilon(noise, rounds, delta)
    found = account(noise, 10, 10, delta).epsilon(rounds)
    assert exact - 1e-6 <= found <= 1.01 * exact + 1e-3
    assert account(noise, 10, 10, delta, "rdp").epsilon(rounds) >= found - 1e-6


def test_more_rounds_spend_more_and_sampling_amplifies():
    values = [account().epsilon(rounds) for rounds in (0, 1, 10, 50)]
    assert values[0] == 0
    assert values == sorted(values)
    assert account(sample=100).epsilon(50) > 3 * values[-1]
    # A fixed size protects against a replacement, which changes the sum by twice the norm.
    fixed = account(accountant="rdp", sampling="fixed")
    assert fixed.epsilon(50) > account(accountant="rdp").epsilon(50)
    everyone = account(noise=0.5, sample=100, accountant="rdp")
    assert fixed.epsilon(50) < everyone.epsilon(50)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_the_noise_for_a_budget_is_the_least(epsilon, accountant):
    settings = account(accountant=accountant)
    noise = noise_for(epsilon, 30, settings)
    assert account(noise, accountant=accountant).epsilon(30) <= epsilon
    assert account(noise / 1.01, accountant=accountant).epsilon(30) > epsilon


def test_a_large_budget_gives_the_least_noise():
    assert noise_for(1e6, 2, account()) == 0.2


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'keras_lp\[privacy\]'"):
        account(noise=1.2345).epsilon(1)
