"""The arguments that the builders share, checked before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lp.backbones.features import CACHE_MEMORY, CacheFeatures
from keras_lp.backbones.freezing import Trainable
from keras_lp.backbones.images import AugmentationLike
from keras_lp.backbones.pooling import Pooling
from keras_lp.backbones.resolve import Weights
from keras_lp.model.optimizers import make_optimizer
from keras_lp.tasks.task import check_hidden_units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of `lp.transfer_model` and `lp.multitask_model`, described there.

    Raises:
        ValueError: if sizes of hidden layers, the dropout, the optimizer or the rate are invalid.
        TypeError: if the optimizer has another type.
    """

    input_shape: Sequence[int | None] | None = None
    image_size: int | Sequence[int] | None = None
    weights: Weights = "imagenet"
    backbone_kwargs: Mapping[str, Any] | None = None
    pretrained: bool | None = None
    trainable: Trainable = "head"
    pooling: Pooling | None = "auto"
    augmentation: AugmentationLike | None = None
    hidden_units: Sequence[int] = ()
    dropout: float = 0.0
    cache_features: CacheFeatures = "auto"
    cache_memory: int = CACHE_MEMORY
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule | None = None
    optimizer: str | keras.optimizers.Optimizer = "adam"

    def __post_init__(self) -> None:
        check_hidden_units(self.hidden_units)
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"`dropout` must be a number from 0 to below 1. Received: dropout={self.dropout!r}."
            )
        self.make_optimizer(default_rate=1e-3)  # raises for one that cannot be made

    def make_optimizer(self, default_rate: float) -> keras.optimizers.Optimizer:
        """Returns the optimizer, with a default rate if it was given by name without one."""
        rate = default_rate if self.learning_rate is None else self.learning_rate
        return make_optimizer(self.optimizer, rate)
