"""Search over the settings of `lp.multitask_model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras_tuner import HyperParameters

from keras_lp.backbones.resolve import BackboneLike
from keras_lp.multitask.comparison import Comparison, compare_single_tasks, sign_of
from keras_lp.multitask.multitask import multitask_model
from keras_lp.tasks.heads import tasks
from keras_lp.tasks.task import TaskLike
from keras_lp.tuning import space
from keras_lp.tuning.hypermodel import BuilderHyperModel, fit_arguments
from keras_lp.tuning.space import SEARCH

GAIN = "val_gain"


class MultitaskHyperModel(BuilderHyperModel):
    """A `keras_tuner.HyperModel` of `lp.multitask_model`.

    Every argument is a value, which is fixed; a function of `hp`, which defines your own search
    space; or for those below `"search"`, the default space.

    | argument | default space | searched by default |
    |---|---|---|
    | `learning_rate` | 1e-4 to 3e-2, on a logarithmic scale | yes |
    | `schedule` | `"constant"` or `"cosine"`, a decay to 0 over the epochs of `fit` | yes |
    | `balancing` | `"equal"`, `"uncertainty"`, `"dwa"`, or a weight per task from 0.25 to 4 | yes |
    | `dropout` | 0 to 0.5 in steps of 0.1 | yes |
    | `hidden_units` | `()`, `(64,)` or `(256,)` | no, `()` |
    | `augmentation` | None, `"light"` or `"strong"` | no, None |
    | `trainable` | the top quarter or half of the blocks, or all | no, `"all"` |

    All trials start from the same weights of a pretrained backbone, which is loaded once.

    The objective `"val_gain"` is the mean gain over single-task models in percent (the delta-m of
    `lp.compare_single_tasks`). Call `compare` before the search; `lp.tune` does so.

    Args:
        backbone: as in `lp.multitask_model`. A model object is copied for each trial.
        tasks: as in `lp.multitask_model`.
        learning_rate: see the table.
        schedule: see the table.
        balancing: see the table.
        dropout: see the table.
        name: as in `keras_tuner.HyperModel`.
        tunable: as in `keras_tuner.HyperModel`.
        **arguments: other arguments of `lp.multitask_model`.

    Attributes:
        comparison: the result of `compare`, None before.

    Raises:
        TypeError: if `lp.multitask_model` does not have an argument.
        ValueError: if a layer of the backbone cannot be copied.

    Example:

    >>> import keras, keras_lp as lp
    >>> import keras_tuner
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> tasks = {"topic": 3, "mood": ["glad", "sad"]}
    >>> hypermodel = lp.MultitaskHyperModel(backbone, tasks, dropout=0.0, pretrained=False)
    >>> hp = keras_tuner.HyperParameters()
    >>> model = hypermodel.build(hp)
    >>> hp.values
    {'learning_rate': 0.001, 'schedule': 'constant', 'balancing': 'equal'}

    Reference: Maninis et al., 2019 (arXiv:1904.08918), on the mean gain.
    """

    def __init__(
        self,
        backbone: BackboneLike,
        tasks: Mapping[str, TaskLike],
        *,
        learning_rate: Any = SEARCH,
        schedule: Any = SEARCH,
        balancing: Any = SEARCH,
        dropout: Any = SEARCH,
        name: str | None = None,
        tunable: bool = True,
        **arguments: Any,
    ) -> None:
        given = {
            "learning_rate": learning_rate,
            "schedule": schedule,
            "balancing": balancing,
            "dropout": dropout,
            **arguments,
        }
        spaces = {
            "learning_rate": space.learning_rate(1e-4, 3e-2, default=1e-3),
            "schedule": space.schedule,
            "balancing": self._balancing,
            "dropout": space.dropout,
            "hidden_units": space.hidden_units,
            "augmentation": space.augmentation,
            "trainable": space.trainable,
        }
        self.comparison: Comparison | None = None
        super().__init__(multitask_model, backbone, tasks, given, spaces, name, tunable)

    def compare(
        self, data: Any, *, validation_data: Any, epochs: int, batch_size: int = 32
    ) -> None:
        """Trains the models that `"val_gain"` compares with: one per task, with the defaults.

        Args:
            data: as in `lp.compare_single_tasks`.
            validation_data: as in `lp.compare_single_tasks`.
            epochs: number of epochs.
            batch_size: batch size for arrays. Defaults to 32.

        Raises:
            ValueError: if a single-task model scores 0, so that gains are not defined.
        """
        found = compare_single_tasks(
            self.build(HyperParameters()),
            data,
            validation_data=validation_data,
            epochs=epochs,
            batch_size=batch_size,
            seeds=1,
            verbose=0,
        )
        self.use(found)

    def use(self, comparison: Comparison) -> None:
        """Uses a comparison that was made before.

        Args:
            comparison: the result of `compare` of an equal hypermodel.

        Raises:
            ValueError: if a single-task model scores 0, so that gains are not defined.
        """
        zero = [name for name, values in comparison.single.items() if not values[0]]
        if zero:
            raise ValueError(
                "A gain is relative to the single-task models, which must not score 0. Received: "
                f"0 for {zero} after the given epochs. Pass more epochs or "
                'objective="val_loss".'
            )
        self.comparison = comparison

    def fit(self, hp: HyperParameters, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Trains the model of a trial and returns its `History`, which includes `val_gain`.

        Args:
            hp: the hyperparameters of the trial.
            model: the output of `build(hp)`.
            *args: arguments of `fit` of the model.
            **kwargs: arguments of `fit` of the model.
        """
        arguments = fit_arguments(model, args, kwargs)
        if self.comparison is not None:
            given = arguments.get("callbacks") or []
            arguments["callbacks"] = [_Gain(self.comparison), *given]
        return super().fit(hp, model, **arguments)

    def _balancing(self, hp: HyperParameters) -> Any:
        """A method, or a weight per task; the first task has weight 1."""
        chosen = hp.Choice("balancing", ["equal", "uncertainty", "dwa", "weights"])
        with hp.conditional_scope("balancing", ["weights"]):
            if chosen != "weights":
                return chosen
            first, *others = self.task
            return {
                first: 1.0,
                **{
                    name: hp.Float(f"weight_{name}", 0.25, 4.0, sampling="log", default=1.0)
                    for name in others
                },
            }


class _Gain(keras.callbacks.Callback):
    """Adds the mean gain over single-task models to the results of each epoch."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self._comparison = comparison

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        gains = []
        for name, result in self._comparison.metrics.items():
            now = (logs or {}).get(f"val_{name}_{result}")
            if now is None:
                return
            single = float(self._comparison.single[name][0])
            sign = sign_of(tasks(self.model)[name].make_metrics()[0])
            gains.append(100 * sign * (now - single) / single)
        logs[GAIN] = float(np.mean(gains))
