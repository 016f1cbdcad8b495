"""Gradual unfreezing: the head first, then block by block (Howard and Ruder, 2018)."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import keras

from keras_lp.finetuning.rates import depths
from keras_lp.utils.arguments import check_positive


class GradualUnfreezing(keras.callbacks.Callback):
    """Unfreezes a model block by block from the top, within one `fit`.

    The head trains from the first epoch, the top block joins it after `epochs_per_block` epochs,
    the next one as many later, and so on. Blocks that wait stand still: their learning rate is 0,
    they do not decay and do not enter the clip norm, but the optimizer collects their moments, so
    that their first step is as large as any other. Nothing is recompiled and no state is lost. A
    warning says how many blocks would never have their turn.

    Args:
        epochs_per_block: how many epochs apart two blocks join; with 0.25, four join at each
            epoch. Defaults to 1.

    Raises:
        ValueError: `epochs_per_block` that is not above 0; or, when training begins, a model that
            `lp.finetune_model` has not compiled.

    Example:

    >>> import keras, keras_lp as lp, numpy as np
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="block1")])
    >>> model = lp.finetune_model(lp.transfer_model(backbone, 2))
    >>> x, y = np.ones((6, 4)), np.array([0, 1] * 3)
    >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[lp.GradualUnfreezing()])

    Reference: Universal Language Model Fine-tuning for Text Classification (arXiv:1801.06146).
    """

    def __init__(self, epochs_per_block: float = 1) -> None:
        super().__init__()
        check_positive("epochs_per_block", epochs_per_block)
        self.epochs_per_block = epochs_per_block

    def on_train_begin(self, logs: Any = None) -> None:
        """Looks at the blocks of the model."""
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not hasattr(optimizer, "set_factors"):
            raise ValueError(
                "GradualUnfreezing needs a model with layerwise learning rates. Received: one "
                f"with the optimizer {type(optimizer).__name__}. Call `lp.finetune_model(model)` "
                "before `fit`."
            )
        self._optimizer = optimizer
        self._depths = depths(self.model)
        epochs = cast("dict[str, int]", self.params)["epochs"]
        last, needed = self._joined(epochs - 1), max(self._depths)
        if last < needed:
            enough = needed * self.epochs_per_block + 1
            warnings.warn(
                f"The lowest {needed - last} of {needed} blocks would never learn: their turn is "
                f"after the last epoch. Received: epochs={epochs}, "
                f"epochs_per_block={self.epochs_per_block}. Train for {math.ceil(enough)} epochs "
                "or more, or give a smaller `epochs_per_block`.",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Lets the blocks move whose turn has come."""
        joined = self._joined(epoch)
        self._optimizer.set_factors([float(depth <= joined) for depth in self._depths])

    def _joined(self, epoch: int) -> int:
        """How many blocks besides the head move in an epoch."""
        return math.floor(epoch / self.epochs_per_block + 1e-9)  # 3 / 0.1 is 30

    def on_train_end(self, logs: Any = None) -> None:
        """Lets everything move again."""
        self._optimizer.set_factors([1.0] * len(self._depths))
