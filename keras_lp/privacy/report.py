"""What differential privacy promises, and what it does not cover."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Literal

from keras_lp.utils.text_table import ShownAsText, text_table

_WIDTH = 100
_CONVERSION = {
    "pld": "privacy loss distributions, composed numerically (dp-accounting)",
    "rdp": "Rényi differential privacy, converted as in Canonne et al., 2020 (dp-accounting)",
}


@dataclasses.dataclass(frozen=True, repr=False)
class PrivacyReport(ShownAsText):
    """The guarantee of a training with differential privacy.

    Printing it shows the figures, the assumptions and what is not covered.

    Attributes:
        unit: what is protected, `"client"` or `"example"`.
        epsilon: the epsilon spent.
        budget: the largest epsilon allowed, None without a limit.
        delta: the probability with which the guarantee may fail.
        releases: number of noised sums: the rounds or steps.
        noise_multiplier: standard deviation of the noise divided by the clipping norm.
        clip: the clipping norm, or `"adaptive"`.
        population: number of units.
        sample: expected number of units in a release.
        sampling: `"poisson"`, `"fixed"`, or `"all"` if every unit takes part each time.
        accountant: `"pld"` or `"rdp"`.
        seeded: whether noise and sampling had a seed, so that nothing is protected.
    """

    unit: str
    epsilon: float
    budget: float | None
    delta: float
    releases: int
    noise_multiplier: float
    clip: float | Literal["adaptive"]
    population: int
    sample: int
    sampling: str
    accountant: str
    seeded: bool

    def __str__(self) -> str:
        changes = "one replaced" if self.sampling == "fixed" else "one more or less"
        samples = {
            "poisson": f"each with probability {self.sample / self.population:.3g}, independently",
            "fixed": f"{self.sample:,} without replacement",
            "all": "all, every time",
        }
        rows = [
            ("protected", f"each {self.unit}: {changes} of {self.population:,}"),
            ("epsilon", f"{self.epsilon:.3f}" + (f" of {self.budget:g}" if self.budget else "")),
            ("delta", f"{self.delta:g}"),
            ("accountant", _CONVERSION[self.accountant]),
            ("releases", f"{self.releases:,}"),
            ("sampling", samples[self.sampling]),
            ("noise multiplier", f"{self.noise_multiplier:.3f}"),
            ("clipping norm", f"{self.clip}"),
        ]
        lines = [text_table(rows, left=2), "", "Assumptions:", *map(_item, self._assumptions())]
        return "\n".join([*lines, "", "Not covered:", *map(_item, self._not_covered())])

    def _assumptions(self) -> list[str]:
        found = [
            f"The {'server' if self.unit == 'client' else 'trainer'} is trusted: it sees each "
            f"{self.unit}'s update before the noise is added to the sum.",
            f"Each person has one {self.unit}; whoever has several is protected less.",
            "The noise has the precision of floating-point numbers.",
        ]
        if self.sampling != "all":
            found.append("Nobody learns who took part in which round.")
        if self.seeded:
            found.insert(0, "NOTHING IS PROTECTED from whoever knows the seed. Leave it out.")
        return found

    def _not_covered(self) -> list[str]:
        return [
            "Other trainings on the same data, also to choose settings: their epsilons add up.",
            f"Whatever else is computed from the {self.unit}s' data, such as `evaluate`.",
            "What the model had before: pretrained weights, a feature scale, class weights and the "
            "mean of labels must be public.",
            *(
                ["Personal layers, and files that tell which clients took part in a round."]
                if self.unit == "client"
                else []
            ),
            f"The number of {self.unit}s, the time that it takes, and errors about the data.",
        ]


def _item(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="- ", subsequent_indent="  ")
