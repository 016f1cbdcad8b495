"""Gradual unfreezing: the head first, then block by block (Howard and Ruder, 2018)."""

from __future__ import annotations

import math
from typing import Any, cast

import keras

from keras_lp.finetuning.rates import depths
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.warn import warn


class GradualUnfreezing(keras.callbacks.Callback):
    """Unfreezes a model block by block from the top, within one `fit`.

    The head trains from the first epoch. The top block joins after `epochs_per_block` epochs, the
    next block after as many more, and so on. Waiting blocks do not change: their learning rate is
    0, they do not decay and do not count in the clip norm. The optimizer still updates their
    moments, so that their first step has a normal size. Nothing is recompiled and no state is
    lost. A warning tells how many blocks would never join.

    Args:
        epochs_per_block: number of epochs between two blocks; with 0.25, four blocks join in each
            epoch. Defaults to 1.

    Raises:
        ValueError: if `epochs_per_block` is not above 0; or, when training begins, if
            `lp.finetune_model` has not compiled the model.

    Example:

    >>> import keras, keras_lp as lp, numpy as np
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="block1")])
    >>> model = lp.finetune_model(lp.transfer_model(backbone, 2))
    >>> x, y = np.ones((6, 4)), np.array([0, 1] * 3)
    >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[lp.GradualUnfreezing()])

    Reference: Howard and Ruder, 2018, Universal Language Model Fine-tuning for Text Classification
    (arXiv:1801.06146).
    """

    def __init__(self, epochs_per_block: float = 1) -> None:
        super().__init__()
        check_positive("epochs_per_block", epochs_per_block)
        self.epochs_per_block = epochs_per_block

    def on_train_begin(self, logs: Any = None) -> None:
        """Determines the blocks of the model."""
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not hasattr(optimizer, "set_factors"):
            raise ValueError(
                "GradualUnfreezing needs a model with layerwise learning rates. Received: a model "
                f"with the optimizer {type(optimizer).__name__}. Call `lp.finetune_model(model)` "
                "before `fit`."
            )
        self._optimizer = optimizer
        self._depths = depths(self.model)
        epochs = cast("dict[str, int]", self.params)["epochs"]
        last, needed = self._joined(epochs - 1), max(self._depths)
        if last < needed:
            enough = needed * self.epochs_per_block + 1
            warn(
                f"The lowest {needed - last} of {needed} blocks would never train: they join "
                f"after the last epoch. Received: epochs={epochs}, "
                f"epochs_per_block={self.epochs_per_block}. Train for {math.ceil(enough)} epochs "
                "or more, or pass a smaller `epochs_per_block`.",
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Unfreezes the blocks that join in this epoch."""
        joined = self._joined(epoch)
        self._optimizer.set_factors([float(depth <= joined) for depth in self._depths])

    def _joined(self, epoch: int) -> int:
        """Returns the number of blocks, without the head, that train in an epoch."""
        return math.floor(epoch / self.epochs_per_block + 1e-9)  # 3 / 0.1 is 30

    def on_train_end(self, logs: Any = None) -> None:
        """Unfreezes all blocks."""
        self._optimizer.set_factors([1.0] * len(self._depths))
