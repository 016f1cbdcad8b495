"""The default search space of each argument, and how a user replaces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras_tuner import HyperParameters

from keras_lp.finetuning.lora import LoRA
from keras_lp.utils.names import near

SEARCH = "search"
SHARES = {"quarter": 1 / 4, "half": 1 / 2}  # of the blocks, by name in the default space
Space = Callable[[HyperParameters], Any]


def value_of(name: str, given: Any, hp: HyperParameters, spaces: Mapping[str, Space]) -> Any:
    """Returns the value of an argument in one trial.

    Args:
        name: name of the argument.
        given: `"search"` for the default space, a function of `hp`, or a fixed value.
        hp: the hyperparameters of the trial.
        spaces: the default spaces by argument.
    """
    if isinstance(given, str) and given == SEARCH and name in spaces:
        return spaces[name](hp)
    return given(hp) if _is_space(given) else given


def _is_space(given: Any) -> bool:
    own = (keras.Layer, keras.optimizers.schedules.LearningRateSchedule, type)
    return callable(given) and not isinstance(given, own)


def check_names(owner: str, given: Mapping[str, Any], known: list[str]) -> None:
    """Raises `TypeError` for an argument that the builder does not have."""
    for name in given:
        if name not in known:
            raise TypeError(
                f"{owner} takes the arguments of the builder, {sorted(known)}. Received: "
                f"{name}={given[name]!r}.{near(name, known)}"
            )


def learning_rate(low: float, high: float, default: float) -> Space:
    """Returns the space of a learning rate on a logarithmic scale."""
    return lambda hp: hp.Float("learning_rate", low, high, sampling="log", default=default)


def schedule(hp: HyperParameters) -> Any:
    """`"constant"` or `"cosine"`."""
    return hp.Choice("schedule", ["constant", "cosine"])


def hidden_units(hp: HyperParameters) -> tuple[int, ...]:
    """No hidden layer, or one."""
    units = hp.Choice("hidden_units", [0, 64, 256])
    return (units,) if units else ()


def dropout(hp: HyperParameters) -> Any:
    """A rate of dropout before the last layer."""
    return hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0)


def augmentation(hp: HyperParameters) -> str | None:
    """No augmentation, or one of the presets."""
    chosen = hp.Choice("augmentation", ["none", "light", "strong"])
    return None if chosen == "none" else chosen


def layer_decay(hp: HyperParameters) -> Any:
    """Ratio of the rates of two blocks."""
    return hp.Float("layer_decay", 0.5, 1.0, step=0.1, default=0.7)


def trainable(hp: HyperParameters) -> Any:
    """A quarter or half of the blocks, from the top, or all."""
    return hp.Choice("trainable", [*SHARES, "all"], default="all")


def lora(hp: HyperParameters) -> LoRA | None:
    """No adapters, or adapters of some rank."""
    rank = hp.Choice("lora_rank", [0, 4, 16])
    return LoRA(rank) if rank else None


def server_optimizer(hp: HyperParameters) -> str | None:
    """The mean update as it is, or an adaptive server optimizer."""
    chosen = hp.Choice("server_optimizer", ["none", "adam", "yogi"])
    return None if chosen == "none" else chosen
