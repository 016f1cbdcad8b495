"""Search over the settings of `lp.finetune_model`, in two phases per trial."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
from keras_tuner import HyperParameters

from keras_lp.backbones.resolve import BackboneLike
from keras_lp.finetuning.finetune import finetune_model
from keras_lp.model.linear_heads import can_be_solved
from keras_lp.model.model import Model
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.heads import copy_heads
from keras_lp.tasks.task import TaskLike
from keras_lp.transfer.linear_probe import fit_head
from keras_lp.transfer.transfer import transfer_model
from keras_lp.tuning import space
from keras_lp.tuning.hypermodel import BuilderHyperModel, fit_arguments, split_off
from keras_lp.tuning.space import SEARCH, value_of

# Arguments of `lp.finetune_model`; the others are those of `lp.transfer_model`.
_RATES = ("learning_rate", "layer_decay", "layer_rates", "lora", "optimizer", "weight_decay")
_HEAD_EPOCHS = 3  # of a head that cannot be solved
_SEED = 0  # of its training

_SPACES = {
    "learning_rate": space.learning_rate(1e-5, 1e-2, default=1e-4),
    "layer_decay": space.layer_decay,
    "trainable": space.trainable,
    "schedule": space.schedule,
    "dropout": space.dropout,
    "lora": space.lora,
    "augmentation": space.augmentation,
    "hidden_units": space.hidden_units,
}


class FinetuneHyperModel(BuilderHyperModel):
    """A `keras_tuner.HyperModel` of fine-tuning in two phases, as in `lp.fit_two_phase`.

    In each trial, a new head is solved on the frozen backbone (`lp.fit_head`; a head with
    `hidden_units` is trained for three epochs), and then all layers train at layerwise rates
    (`lp.finetune_model`). The features, and the head of each form, are computed once for all
    trials. Epochs are those of the second phase. A trial that continues another one (Hyperband)
    continues from its weights and has no first phase.

    Every argument is a value, which is fixed; a function of `hp`, which defines your own search
    space; or for those below `"search"`, the default space.

    | argument | default space | searched by default |
    |---|---|---|
    | `learning_rate` | 1e-5 to 1e-2, on a logarithmic scale | yes |
    | `layer_decay` | 0.5 to 1 in steps of 0.1; not with `lora` | yes |
    | `trainable` | the top quarter or half of the blocks, or all; not with `lora` | yes |
    | `schedule` | `"constant"` or `"cosine"`, a decay to 0 over the epochs of `fit` | yes |
    | `dropout` | 0 to 0.5 in steps of 0.1 | yes |
    | `lora` | None, or adapters of rank 4 or 16 | no, None |
    | `augmentation` | None, `"light"` or `"strong"` | no, None |
    | `hidden_units` | `()`, `(64,)` or `(256,)` | no, `()` |

    Args:
        backbone: as in `lp.transfer_model`; pretrained. A model object is copied for each trial.
        task: as in `lp.transfer_model`.
        learning_rate: see the table.
        layer_decay: see the table.
        trainable: see the table.
        schedule: see the table.
        dropout: see the table.
        name: as in `keras_tuner.HyperModel`.
        tunable: as in `keras_tuner.HyperModel`.
        **arguments: other arguments of `lp.transfer_model`, and `lora`, `layer_rates`, `optimizer`
            and `weight_decay` of `lp.finetune_model`.

    Raises:
        TypeError: if neither builder has an argument.
        ValueError: if a layer of the backbone cannot be copied.

    Example:

    >>> import keras, keras_lp as lp
    >>> import keras_tuner
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> hypermodel = lp.FinetuneHyperModel(backbone, 3, trainable="all", schedule="cosine")
    >>> hp = keras_tuner.HyperParameters()
    >>> model = hypermodel.build(hp)
    >>> sorted(hp.values)
    ['dropout', 'layer_decay', 'learning_rate']

    References: Kumar et al., 2022, Fine-Tuning can Distort Pretrained Features
    (arXiv:2202.10054); Howard and Ruder, 2018 (arXiv:1801.06146).
    """

    own = ("schedule", *_RATES)

    def __init__(
        self,
        backbone: BackboneLike,
        task: TaskLike,
        *,
        learning_rate: Any = SEARCH,
        layer_decay: Any = SEARCH,
        trainable: Any = SEARCH,
        schedule: Any = SEARCH,
        dropout: Any = SEARCH,
        name: str | None = None,
        tunable: bool = True,
        **arguments: Any,
    ) -> None:
        given = {
            "learning_rate": learning_rate,
            "layer_decay": layer_decay,
            "trainable": trainable,
            "schedule": schedule,
            "dropout": dropout,
            **arguments,
        }
        if not self.is_shared(arguments):
            raise ValueError(
                "Fine-tuning starts from a pretrained backbone. Received: "
                f"{ {n: arguments[n] for n in ('weights', 'pretrained') if n in arguments} }. To "
                'train from scratch, use TransferHyperModel(..., trainable="all").'
            )
        self._solved: dict[Any, Any] = {}
        super().__init__(transfer_model, backbone, as_task(task), given, _SPACES, name, tunable)

    def values(self, hp: HyperParameters) -> dict[str, Any]:
        """Returns the arguments of one trial by name.

        Args:
            hp: the hyperparameters of the trial.
        """
        given = dict(self.given)
        lora = value_of("lora", given.pop("lora", None), hp, _SPACES)
        if given.get("layer_rates") is not None:
            given.pop("layer_decay", None)
        layered = [name for name in ("layer_decay", "trainable") if name in given]
        values = {k: value_of(k, v, hp, _SPACES) for k, v in given.items() if k not in layered}
        if lora is None:  # adapters all train, at one rate
            in_scope = "lora_rank" in hp
            scope = hp.conditional_scope("lora_rank", [0]) if in_scope else nullcontext()
            with scope:
                values |= {name: value_of(name, given[name], hp, _SPACES) for name in layered}
        return {"lora": lora, **values}

    def make(self, values: Mapping[str, Any]) -> Model:
        """Returns the compiled model of a trial, with a new head.

        Args:
            values: the output of `values(hp)`.
        """
        above = {k: v for k, v in values.items() if k not in self.own}
        rates = {k: v for k, v in values.items() if k in _RATES}
        above.setdefault("trainable", "all")
        trainable = self.layers_to_train(above)
        return finetune_model(self.from_backbone(above), trainable=trainable, **rates)

    def fit(self, hp: HyperParameters, model: Model, *args: Any, **kwargs: Any) -> Any:
        """Solves the head, trains all layers, and returns the `History` of the second phase.

        Args:
            hp: the hyperparameters of the trial.
            model: the output of `build(hp)`.
            *args: arguments of `fit` of the model.
            **kwargs: arguments of `fit` of the model.
        """
        arguments = split_off(fit_arguments(model, args, kwargs))
        if not arguments.get("initial_epoch"):
            self._start_head(model, self.values(hp), arguments)
        return super().fit(hp, model, **arguments)

    def forget_features(self) -> None:
        """Frees the memory and the files of the features, and the solved head."""
        super().forget_features()
        self._solved.clear()

    def _start_head(
        self, model: Model, values: Mapping[str, Any], arguments: dict[str, Any]
    ) -> None:
        """Sets the layers above the features to those that were solved on the frozen backbone."""
        without = ("trainable", "augmentation", *self.own)
        above = {name: value for name, value in values.items() if name not in without}
        data = {name: arguments.get(name) for name in ("x", "y", "sample_weight")}
        if not above.get("hidden_units"):
            above.pop("dropout", None)  # a solved head does not depend on it
        key = repr(sorted(above.items())), *map(id, data.values())
        if key not in self._solved:
            after = np.random.randint(2**31)
            keras.utils.set_random_seed(_SEED)  # whichever trial needs this head first
            frozen = self.from_backbone({**above, "trainable": "head"})
            given = {**data, "batch_size": arguments.get("batch_size")}
            given = self.shared_features(values).replace(given)
            if can_be_solved(frozen):
                parts = (given[name] for name in ("x", "y", "sample_weight"))
                fit_head(frozen, given["x"] if given["y"] is None else tuple(parts), verbose=0)
            else:
                frozen.fit(**given, epochs=_HEAD_EPOCHS, verbose=0)
            self._solved[key] = frozen, data  # the ids stay in use
            keras.utils.set_random_seed(after)
        copy_heads(self._solved[key][0], model)
