"""Differential privacy of the clients of a federation: DP-FedAvg.

McMahan et al., 2018, Learning Differentially Private Recurrent Language Models (arXiv:1710.06963).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_lp.federated.engine.rounds import PrivateRound
from keras_lp.model import class_balance
from keras_lp.privacy.differential_privacy import DifferentialPrivacy
from keras_lp.privacy.mechanism import Mechanism
from keras_lp.privacy.report import PrivacyReport
from keras_lp.tasks.heads import heads
from keras_lp.utils.files import whole_file

_LEDGER = "privacy.json"  # in the folder of checkpoints


class PrivateClients:
    """The samples, clipping norms, noise and account of a private federation.

    Args:
        settings: the settings.
        clients_per_round: expected number of clients per round, None for all.
    """

    def __init__(self, settings: DifferentialPrivacy, clients_per_round: int | None) -> None:
        self._settings = settings
        self._clients_per_round = clients_per_round
        self._mechanism: Mechanism | None = None
        self._ledger: Path | None = None

    def begin(self, model: keras.Model, population: int, rounds: int) -> None:
        """Prepares a call of `fit`; the noise is chosen in the first one.

        Raises:
            ValueError: if the number of clients changed, the model needs statistics of the clients,
                or its weights have half precision.
        """
        if class_balance.waiting_heads(heads(model)):
            raise ValueError(
                'class_weight="balanced" counts the labels of the clients, without noise. '
                "Received: such a model with `privacy`. Pass the weights as a dict."
            )
        rounded = [v.path for v in model.trainable_variables if v.dtype in ("float16", "bfloat16")]
        if rounded:
            raise ValueError(
                "Private updates must be summed in float32. Received: the weights "
                f"{rounded[:3]} with half precision. Build the model with float32 weights."
            )
        if self._mechanism is None:
            sample = self._clients_per_round or population
            self._mechanism = Mechanism(self._settings, "client", population, sample, rounds)
        elif self._mechanism.account.population != population:
            raise ValueError(
                "The clients of a private federation must stay the same, as the account is about "
                f"them. Received: {population} clients, before "
                f"{self._mechanism.account.population}."
            )

    def check_budget(self) -> None:
        """Raises `ValueError` unless the budget allows a round."""
        known = self._known
        if known.allows():
            return
        if known.releases == 0:
            raise ValueError(
                "The privacy budget must allow a round. Received: "
                f"epsilon={self._settings.epsilon} with "
                f"noise_multiplier={known.account.noise_multiplier:.3g}. Raise one of them."
            )
        raise ValueError(
            "Another round would pass the privacy budget. Received: "
            f"epsilon={self._settings.epsilon}, of which {known.epsilon():.3f} is spent "
            f"after {known.releases} rounds. The model can be used as it is."
        )

    def allows(self) -> bool:
        """Whether the budget allows another round."""
        return self._known.allows()

    def next_round(
        self, ids: Sequence[Hashable], shapes: Sequence[Sequence[int]]
    ) -> tuple[list[Any], PrivateRound]:
        """Counts a round, and returns its clients and what it needs.

        Without any sampled client, one stands in, whose update does not count.
        """
        known = self._known
        known.start()
        if self._ledger is not None:
            with whole_file(self._ledger) as file:
                file.write(json.dumps({**self._about(), **known.state()}).encode())
        chosen = known.sample()
        sampled = [ids[i] for i in chosen] or [ids[0]]
        expected = known.account.sample
        capacity = min(len(ids), expected + math.ceil(4 * math.sqrt(expected)))
        return sampled, PrivateRound(
            clip=known.clip,
            noise=known.noise(shapes),
            expected=expected,
            capacity=max(capacity, len(sampled)),
            counts=bool(len(chosen)),
            random=known.generator(),
        )

    def end_round(self, within: int, sampled: int) -> dict[str, float]:
        """Adapts the clipping norm and returns the logs of a round.

        Args:
            within: number of clients whose update was at most as long as the clipping norm.
            sampled: number of clients that counted.
        """
        logs = {"epsilon": self._known.epsilon(), "clip": self._known.clip}
        self._known.adapt(within, sampled)
        return logs

    def state(self) -> dict[str, float]:
        """Returns what a checkpoint must hold."""
        return self._known.state()

    def resume(self, folder: Path, state: dict[str, float] | None) -> None:
        """Continues the account of a folder of checkpoints.

        Rounds that were begun and lost count too: somebody may have seen their outcome.

        Args:
            folder: the folder.
            state: `state` of a checkpoint, None without one.

        Raises:
            ValueError: if the folder has another account.
        """
        self._ledger = folder / _LEDGER
        ledger = json.loads(self._ledger.read_text()) if self._ledger.exists() else None
        known, found = self._known, state or ledger
        if found is None:
            return
        if known.releases == 0:
            known.restore(found)
        others = {**found, **(ledger or {})}
        about = {**self._about(), "noise_multiplier": known.account.noise_multiplier}
        wrong = sorted(name for name in about if others.get(name, about[name]) != about[name])
        if wrong:
            raise ValueError(
                "A folder of checkpoints must hold the account of this federation. Received: "
                f"{folder}, which was written with other {wrong}. Use another `checkpoint_dir`."
            )
        known.releases = max(known.releases, int(others["releases"]))

    def _about(self) -> dict[str, Any]:
        """Returns what an account is about, JSON values by name."""
        account = self._known.account
        settings = dataclasses.asdict(self._settings)
        return {"settings": settings, "population": account.population, "sample": account.sample}

    def report(self) -> PrivacyReport:
        """Returns the report of the rounds so far."""
        return self._known.report()

    @property
    def _known(self) -> Mechanism:
        if self._mechanism is None:
            raise ValueError(
                "A privacy report needs a federation that has begun. Received: one without a "
                "round. Call `fit` first."
            )
        return self._mechanism
