"""The Gaussian mechanism over several releases: sample, clip, noise, account."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_lp.privacy.accounting import Account, noise_for
from keras_lp.privacy.differential_privacy import DifferentialPrivacy
from keras_lp.privacy.randomness import Randomness, randomness
from keras_lp.privacy.report import PrivacyReport

# Adaptive clipping, Andrew et al., 2021, section 3.
_QUANTILE, _CLIP_RATE = 0.5, 0.2
_COUNT_NOISE = 1 / 20  # standard deviation of the noise on the count, as a share of the sample


class Mechanism:
    """Clips, adds noise and keeps the account over the releases of a training.

    For each release: `start` counts it, `sample` and `noise` are used once, and `adapt` follows.

    Args:
        settings: the settings.
        unit: what is protected, `"client"` or `"example"`.
        population: number of units.
        sample: expected number of units in a release.
        releases: planned number of releases, from which the noise is chosen.
        first_clip: where an adaptive clipping norm starts. Defaults to 0.1.

    Raises:
        ValueError: if `delta` is too large for the population, or adaptive clipping is impossible
            with so much noise.
        ImportError: if dp-accounting is not installed.

    Attributes:
        account: the account of the releases.
        releases: how many there were.
        clip: the current clipping norm.
    """

    def __init__(
        self,
        settings: DifferentialPrivacy,
        unit: str,
        population: int,
        sample: int,
        releases: int,
        first_clip: float = 0.1,
    ) -> None:
        if settings.delta >= 1 / population:
            raise ValueError(
                f"`delta` must be below 1 / {unit}s, else the guarantee could fail for one of "
                f"them. Received: delta={settings.delta} for {population} {unit}s. Pass a delta "
                f"below {1 / population:.1e}."
            )
        self.settings = settings
        self.unit = unit
        fixed = settings.sampling == "fixed" and sample != population
        self.account = Account(
            noise_multiplier=settings.noise_multiplier or math.nan,
            population=population,
            sample=sample,
            sampling=settings.sampling,
            accountant=settings.accountant or ("rdp" if fixed else "pld"),
            delta=settings.delta,
        )
        if settings.noise_multiplier is None:
            noise = noise_for(settings.epsilon or math.nan, releases, self.account)
            self.account = dataclasses.replace(self.account, noise_multiplier=noise)
        self.releases = 0
        self.clip = first_clip if settings.clip == "adaptive" else float(settings.clip)
        self._update_noise()  # raises an error if it is impossible

    def allows(self) -> bool:
        """Whether the budget allows another release."""
        budget = self.settings.epsilon
        return budget is None or self.account.epsilon(self.releases + 1) <= budget

    def epsilon(self) -> float:
        """Returns the epsilon spent so far."""
        return self.account.epsilon(self.releases)

    def start(self) -> None:
        """Counts a release, before anything of it is computed."""
        self.releases += 1

    def sample(self) -> np.ndarray:
        """Returns the sorted numbers of the units of this release; there may be none."""
        if self.account.all_take_part:
            return np.arange(self.account.population)
        chances = self._randomness(1).random(self.account.population)
        if self.settings.sampling == "fixed":
            return np.sort(np.argsort(chances)[: self.account.sample])
        return np.flatnonzero(chances < self.account.sample / self.account.population)

    def generator(self) -> np.random.Generator:
        """Returns random numbers for the work of the units in this release.

        They must be secret too: seeds that others know, given out by place, would tie the updates
        of some units to the presence of another.
        """
        seed = self.settings.seed
        return np.random.default_rng(None if seed is None else (seed, self.releases, 4))

    def noise(self, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Returns the noise of this release for a sum of updates, float32."""
        random, deviation = self._randomness(2), self._update_noise() * self.clip
        return [(deviation * random.standard_normal(shape)).astype("float32") for shape in shapes]

    def adapt(self, within: int, count: int) -> None:
        """Moves an adaptive clipping norm towards the median norm.

        Args:
            within: number of units of this release whose norm was at most the clipping norm.
            count: number of units of this release.
        """
        if self.settings.clip != "adaptive":
            return
        deviation = _COUNT_NOISE * self.account.sample
        noise = deviation * float(self._randomness(3).standard_normal((1,))[0])
        share = (within - count / 2 + noise) / self.account.sample + 0.5
        self.clip *= math.exp(-_CLIP_RATE * (share - _QUANTILE))

    def state(self) -> dict[str, float]:
        """Returns what a checkpoint must hold, JSON values by name."""
        noise = self.account.noise_multiplier
        return {"releases": self.releases, "clip": self.clip, "noise_multiplier": noise}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores `state`; releases are never forgotten."""
        self.releases = max(self.releases, int(state["releases"]))
        self.clip = float(state["clip"])
        self.account = dataclasses.replace(
            self.account, noise_multiplier=float(state["noise_multiplier"])
        )

    def report(self) -> PrivacyReport:
        """Returns the report of the releases so far."""
        return PrivacyReport(
            unit=self.unit,
            epsilon=self.epsilon(),
            budget=self.settings.epsilon,
            delta=self.settings.delta,
            releases=self.releases,
            noise_multiplier=self.account.noise_multiplier,
            clip=self.settings.clip,
            population=self.account.population,
            sample=self.account.sample,
            sampling="all" if self.account.all_take_part else self.settings.sampling,
            accountant=self.account.accountant,
            seeded=self.settings.seed is not None,
        )

    def _update_noise(self) -> float:
        """Returns the noise multiplier of the update; an adaptive clip takes part of the noise."""
        noise = self.account.noise_multiplier
        if self.settings.clip != "adaptive":
            return noise
        # The count is centred, so one unit changes it by at most one half.
        of_count = 2 * _COUNT_NOISE * self.account.sample
        if noise >= of_count:
            raise ValueError(
                f"Adaptive clipping needs a noise multiplier below 0.1 * {self.unit}s per round, "
                "else the noise of the median takes the whole budget. Received: a noise "
                f"multiplier of {noise:.3g} for {self.account.sample} {self.unit}s per round. "
                "Pass `clip` as a number, or sample more."
            )
        return (noise**-2 - of_count**-2) ** -0.5

    def _randomness(self, purpose: int) -> Randomness:
        seed = self.settings.seed
        return randomness(None if seed is None else (seed, self.releases, purpose))
