"""Fine-tuning in two phases with one call: the head alone, then all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_lp.finetuning.finetune import finetune_model
from keras_lp.finetuning.rate_finder import find_learning_rate
from keras_lp.model.linear_heads import can_be_solved
from keras_lp.transfer.linear_probe import fit_head
from keras_lp.utils.arguments import Verbose, check_positive
from keras_lp.utils.progress import bar_only
from keras_lp.utils.text_table import text_table

_USUAL = 1e-3  # the rate of heads that are trained, and the reference of the layer rates


def fit_two_phase(
    model: keras.Model,
    data: Any,
    *,
    head_epochs: int | None = None,
    epochs: int,
    learning_rate: float | Literal["auto"] = "auto",
    layer_decay: float = 0.7,
    weight_decay: float | None = 1e-4,
    batch_size: int = 32,
    validation_data: Any = None,
    restore_best: bool = True,
    callbacks: Sequence[keras.callbacks.Callback] | None = None,
    verbose: Verbose = "auto",
) -> keras.callbacks.History:
    """Solves the head with a frozen backbone, then trains all layers at layerwise rates.

    First the head alone: `lp.fit_head` finds its optimum on the frozen features, so that the large
    errors of a new head do not disturb the backbone. Then all layers, with AdamW: the head's rate
    is half of `learning_rate`, and decreases by `layer_decay` per block, with a warm-up over the
    first tenth of the steps and a cosine decay to 0. Finally a table shows training and validation
    side by side: if the training loss still falls while the validation loss rises, the model
    overfits.

    Args:
        model: a model from a builder, or any compiled Keras model with a loss; it is trained and
            recompiled in place.
        data: `(x, y)` or `(x, y, sample_weight)` arrays, or a batched `tf.data.Dataset` with a
            known number of batches.
        head_epochs: None solves the head and reports it as the first epoch; a head that cannot be
            solved (`augmentation`, `hidden_units`, your own model) is trained for one epoch. A
            number trains the head for that many epochs at `learning_rate` (1e-3 for `"auto"`),
            like fastai's `fine_tune`; 0 skips the first phase. Defaults to None.
        epochs: number of epochs for all layers.
        learning_rate: twice the highest rate of the second phase. `"auto"` takes twice the valley
            of `lp.find_learning_rate`, which first trains for up to 100 steps and then restores
            the model. Defaults to `"auto"`.
        layer_decay: ratio of the rates of two consecutive blocks. Defaults to 0.7.
        weight_decay: decoupled weight decay; None turns it off. Defaults to 1e-4.
        batch_size: batch size for arrays. Defaults to 32.
        validation_data: as in `fit`. Defaults to None.
        restore_best: whether to restore the weights of the epoch with the lowest `val_loss` at the
            end, including the head-only epochs. Without `validation_data` the last weights are
            kept. Defaults to True.
        callbacks: callbacks for both phases. The epoch count continues in the second phase, and
            `EarlyStopping` ends only its phase. Defaults to None.
        verbose: as in `fit`; 0 also omits the table. Defaults to `"auto"`.

    Returns:
        One `History` of both phases, with a continuous `epoch` count. Its attribute `phases` has
        the number of epochs of each phase by name.

    Raises:
        ValueError: if epochs, rates or data are invalid.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, 2)
    >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    >>> history = lp.fit_two_phase(model, (x, x[:, 0] > 0), epochs=2, learning_rate=1e-3, verbose=0)
    >>> history.epoch  # the solved head, then two epochs of all layers
    [0, 1, 2]

    References: Kumar et al., 2022, Fine-Tuning can Distort Pretrained Features
    (arXiv:2202.10054); Howard and Ruder, 2018 (arXiv:1801.06146); Howard and Gugger, 2020, fastai
    (arXiv:2002.04688).
    """
    check_positive("epochs", epochs, integer=True)
    if head_epochs is not None and head_epochs != 0:
        check_positive("head_epochs", head_epochs, integer=True)
    if learning_rate != "auto":
        check_positive("learning_rate", learning_rate)
    steps = epochs * _batches_an_epoch(data, batch_size)
    best = _Best() if restore_best and validation_data is not None else None
    history = _History()
    history.set_model(model)
    history.on_train_begin()

    def fit(first: int, last: int) -> None:
        if isinstance(data, tf.data.Dataset):
            arguments: dict[str, Any] = {"x": data}
        else:
            arguments = dict(zip(("x", "y", "sample_weight"), data, strict=False))
            arguments["batch_size"] = batch_size
        part = model.fit(
            **arguments,
            initial_epoch=first,
            epochs=last,
            validation_data=validation_data,
            callbacks=[*(callbacks or []), *([best] if best else [])],
            verbose=verbose,
        )
        add(part)

    def add(part: keras.callbacks.History) -> None:
        history.epoch += part.epoch
        for name, values in part.history.items():
            history.history.setdefault(name, []).extend(values)

    settings: Any = {"optimizer": "adamw", "weight_decay": weight_decay, "layer_decay": layer_decay}
    if head_epochs != 0:
        rate = _USUAL if learning_rate == "auto" else learning_rate
        finetune_model(model, trainable="head", learning_rate=rate, **settings)
    if head_epochs is None and can_be_solved(model):
        solved = fit_head(model, data, validation_data=validation_data, verbose=verbose)
        for name in [name for name in solved.history if name.endswith(("l2", "cv_loss"))]:
            del solved.history[name]
        add(solved)
        if best:
            best.set_model(model)
            best.on_epoch_end(0, {name: value for name, (value,) in solved.history.items()})
        head_epochs = 1
    elif head_epochs != 0:
        head_epochs = head_epochs or 1
        fit(0, head_epochs)
    if learning_rate == "auto":
        finetune_model(model, trainable="all", learning_rate=_USUAL, **settings)
        found = find_learning_rate(model, data, batch_size=batch_size, verbose=bar_only(verbose))
        learning_rate = 2 * found.valley
        if verbose not in (0, False):
            print(f"Learning rate by find_learning_rate: {learning_rate:.1e}")
    warm_up = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate / 100,
        decay_steps=max(1, steps - warm_up),
        warmup_target=learning_rate / 2,
        warmup_steps=warm_up,
    )
    finetune_model(model, trainable="all", learning_rate=schedule, **settings)
    fit(head_epochs, head_epochs + epochs)
    if best:
        best.restore(model)
    phases = {"head": head_epochs, "all layers": epochs}
    history.phases = {name: count for name, count in phases.items() if count}
    model.history = history
    if verbose not in (0, False):
        print(_table(history, head_epochs, best.epoch if best else None))
    return history


class _History(keras.callbacks.History):
    """A `History` with the number of epochs of each phase."""

    phases: dict[str, int]


class _Best(keras.callbacks.Callback):
    """Stores the weights of the epoch with the lowest validation loss, over several `fit`s."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch: int | None = None
        self._loss = math.inf
        self._weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        loss = (logs or {}).get("val_loss", math.inf)
        if loss < self._loss:
            self._loss, self.epoch = loss, epoch
            self._weights = [np.array(weight) for weight in self.model.weights]

    def restore(self, model: keras.Model) -> None:
        for weight, value in zip(model.weights, self._weights, strict=bool(self._weights)):
            weight.assign(value)


def _batches_an_epoch(data: Any, batch_size: int) -> int:
    if not isinstance(data, tf.data.Dataset):
        if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
            raise ValueError(
                "`data` must be (x, y), (x, y, sample_weight) or a batched tf.data.Dataset. "
                f"Received: data of type {type(data).__name__}."
            )
        check_positive("batch_size", batch_size, integer=True)
        return math.ceil(len(keras.tree.flatten(data[0])[0]) / batch_size)
    count = int(data.cardinality())
    if count < 1:
        raise ValueError(
            "The schedule needs a data set with a known number of batches, above 0. Received: a "
            f"cardinality of {count}. Set it with "
            "dataset.apply(tf.data.experimental.assert_cardinality(n))."
        )
    return count


def _table(history: keras.callbacks.History, head_epochs: int, best: int | None) -> str:
    names = [name for name in history.history if not name.startswith("val_")]
    columns = [c for name in names for c in (name, f"val_{name}") if c in history.history]
    rows = [["epoch", "trains", *columns, ""]]
    for i, epoch in enumerate(history.epoch):
        values = [f"{history.history[column][i]:.4f}" for column in columns]
        trains = "head" if epoch < head_epochs else "all"
        rows.append([str(epoch + 1), trains, *values, "best" if epoch == best else ""])
    return text_table(rows)
