"""`DifferentialPrivacy`: how strong the protection is, and how it is reached."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

from keras_lp.utils.arguments import check_choice, check_positive

Sampling = Literal["poisson", "fixed"]
Accounting = Literal["pld", "rdp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentialPrivacy:
    """Settings of training with differential privacy.

    What is learned from one unit (a client of a federation, an example of `lp.fit_head`) is clipped
    to a norm, and Gaussian noise is added to the sum. The outcome then hardly depends on any single
    unit: with and without it, the probability of every outcome differs at most by the factor
    `exp(epsilon)`, apart from a probability of `delta`.

    Args:
        delta: the probability with which the guarantee may fail, above 0 and below 1 / units.
        epsilon: the budget. Training stops before it would be passed. Without `noise_multiplier`,
            the noise is chosen so that the planned rounds use it up. Defaults to None: no limit.
        noise_multiplier: standard deviation of the noise divided by the clipping norm. Defaults to
            None: chosen from `epsilon`.
        clip: the L2 norm to which the whole update of a unit is clipped. `"adaptive"` follows the
            median norm, with noise that is part of the account. Defaults to `"adaptive"`.
        sampling: `"poisson"` draws each unit independently, which protects more for the same noise;
            the number of units then varies. `"fixed"` draws a fixed number without replacement and
            is accounted as that. If all units take part in every round, there is no sampling.
            Defaults to `"poisson"`.
        accountant: `"pld"` (privacy loss distributions, the tightest) or `"rdp"` (Rényi
            differential privacy), both of dp-accounting. Defaults to None: `"pld"`, and `"rdp"` for
            `sampling="fixed"`, which privacy loss distributions do not support.
        seed: seed of noise and sampling, for tests only: whoever knows it can subtract the noise.
            Defaults to None: the operating system's cryptographic random numbers.

    Raises:
        ValueError: if a number is out of range, neither `epsilon` nor `noise_multiplier` is given,
            or the accountant does not support the sampling.

    Example:

    >>> import keras_lp as lp
    >>> lp.DifferentialPrivacy(epsilon=8, delta=1e-5).clip
    'adaptive'

    References: McMahan et al., 2018, Learning Differentially Private Recurrent Language Models
    (arXiv:1710.06963); Abadi et al., 2016, Deep Learning with Differential Privacy
    (arXiv:1607.00133); Andrew et al., 2021, Differentially Private Learning with Adaptive Clipping
    (arXiv:1905.03871).
    """

    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    clip: float | Literal["adaptive"] = "adaptive"
    sampling: Sampling = "poisson"
    accountant: Accounting | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("delta", "epsilon", "noise_multiplier", "clip"):
            value = getattr(self, name)
            if value is None or value == "adaptive":
                continue
            check_positive(name, value)
            if not math.isfinite(value):
                raise ValueError(f"`{name}` must be finite. Received: {name}={value!r}.")
            object.__setattr__(self, name, float(value))
        if self.delta >= 1:
            raise ValueError(f"`delta` must be below 1. Received: delta={self.delta!r}.")
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "`epsilon` or `noise_multiplier` must be given. Received: neither. Pass for "
                "example epsilon=8."
            )
        check_choice("sampling", self.sampling, get_args(Sampling))
        if self.accountant is not None:
            check_choice("accountant", self.accountant, get_args(Accounting))
        if self.sampling == "fixed" and self.accountant == "pld":
            raise ValueError(
                "Privacy loss distributions do not support samples of a fixed size. Received: "
                'accountant="pld", sampling="fixed". Pass accountant="rdp" or sampling="poisson".'
            )
        if self.seed is None:
            return
        if not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ValueError(
                f"`seed` must be None or an integer of 0 or more. Received: seed={self.seed!r}."
            )
        object.__setattr__(self, "seed", int(self.seed))
