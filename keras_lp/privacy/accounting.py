"""How much of a privacy budget is spent, with dp-accounting."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

from keras_lp.privacy.differential_privacy import Accounting, Sampling

_INTERVAL = 1e-3  # between the losses of a distribution; larger intervals are still upper bounds
_LEAST_NOISE = 0.2  # with less, epsilon means little, and its computation needs much memory
_INSTALL = "Differential privacy needs dp-accounting. Install it: pip install 'keras_lp[privacy]'"


@dataclasses.dataclass(frozen=True)
class Account:
    """The privacy of releases of a sum with Gaussian noise.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by the clipping norm.
        population: number of units.
        sample: expected number of units in a release.
        sampling: how they are drawn.
        accountant: how releases are composed.
        delta: the probability with which the guarantee may fail.
    """

    noise_multiplier: float
    population: int
    sample: int
    sampling: Sampling
    accountant: Accounting
    delta: float

    @property
    def all_take_part(self) -> bool:
        """Whether there is no sampling."""
        return self.sample == self.population

    def epsilon(self, releases: int) -> float:
        """Returns the epsilon of a number of releases."""
        return 0.0 if releases == 0 else _epsilon(self, releases)


def noise_for(epsilon: float, releases: int, account: Account) -> float:
    """Returns the least noise multiplier, from 0.2, with which releases stay within epsilon.

    Args:
        epsilon: the budget.
        releases: how many there will be.
        account: the other settings; its noise multiplier is not used.
    """

    def spent(noise: float) -> float:
        return dataclasses.replace(account, noise_multiplier=noise).epsilon(releases)

    if spent(_LEAST_NOISE) <= epsilon:
        return _LEAST_NOISE
    low, high = _LEAST_NOISE, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high


def dp_accounting() -> Any:
    """Returns the package.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    return dp_accounting


@functools.lru_cache(maxsize=4096)
def _epsilon(account: Account, releases: int) -> float:
    if account.accountant == "rdp":
        return float(_rdp_epsilon(account, releases))
    composed = _distribution(account).self_compose(releases)
    return float(composed.get_epsilon_for_delta(account.delta))


@functools.lru_cache(maxsize=8)
def _distribution(account: Account) -> Any:
    dp_accounting()
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        account.noise_multiplier,
        sampling_prob=account.sample / account.population,
        value_discretization_interval=_INTERVAL,
    )


def _rdp_epsilon(account: Account, releases: int) -> float:
    package = dp_accounting()
    from dp_accounting import rdp

    event = package.GaussianDpEvent(account.noise_multiplier)
    relation = package.NeighboringRelation.ADD_OR_REMOVE_ONE
    if account.sampling == "fixed" and not account.all_take_part:
        # One unit in another's place changes the sum by up to twice the clipping norm.
        relation = package.NeighboringRelation.REPLACE_ONE
        event = package.SampledWithoutReplacementDpEvent(
            account.population,
            account.sample,
            package.GaussianDpEvent(account.noise_multiplier / 2),
        )
    elif not account.all_take_part:
        event = package.PoissonSampledDpEvent(account.sample / account.population, event)
    with _without_warnings():  # of orders that are left out
        accountant = rdp.RdpAccountant(neighboring_relation=relation)
        accountant.compose(event, releases)
        return accountant.get_epsilon(account.delta)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
