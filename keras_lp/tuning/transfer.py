"""Search over the settings of `lp.transfer_model`."""

from __future__ import annotations

from typing import Any

from keras_lp.backbones.resolve import BackboneLike
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.task import TaskLike
from keras_lp.transfer.transfer import transfer_model
from keras_lp.tuning import space
from keras_lp.tuning.hypermodel import BuilderHyperModel
from keras_lp.tuning.space import SEARCH

_SPACES = {
    "learning_rate": space.learning_rate(1e-4, 3e-2, default=1e-3),
    "schedule": space.schedule,
    "hidden_units": space.hidden_units,
    "dropout": space.dropout,
    "augmentation": space.augmentation,
    "trainable": space.trainable,
}


class TransferHyperModel(BuilderHyperModel):
    """A `keras_tuner.HyperModel` of `lp.transfer_model`: a frozen backbone and a new head.

    Every argument is a value, which is fixed; a function of `hp`, which defines your own search
    space; or for those below `"search"`, the default space.

    | argument | default space | searched by default |
    |---|---|---|
    | `learning_rate` | 1e-4 to 3e-2, on a logarithmic scale | yes |
    | `schedule` | `"constant"` or `"cosine"`, a decay to 0 over the epochs of `fit` | yes |
    | `hidden_units` | `()`, `(64,)` or `(256,)` | yes |
    | `dropout` | 0 to 0.5 in steps of 0.1 | yes |
    | `augmentation` | None, `"light"` or `"strong"` | no, None |
    | `trainable` | the top quarter or half of the blocks, or all | no, `"head"` |

    All trials start from the same weights of a pretrained backbone, which is loaded once. The
    features of arrays (and of data sets with `cache_features=True`) are computed once for all.
    `augmentation` and `trainable` make the features change, so that each trial computes its own.

    Args:
        backbone: as in `lp.transfer_model`.
        task: as in `lp.transfer_model`.
        learning_rate: see the table.
        schedule: see the table.
        hidden_units: see the table.
        dropout: see the table.
        name: as in `keras_tuner.HyperModel`.
        tunable: as in `keras_tuner.HyperModel`.
        **arguments: other arguments of `lp.transfer_model`.

    Raises:
        TypeError: if `lp.transfer_model` does not have an argument.
        ValueError: if a layer of the backbone cannot be copied.

    Example:

    >>> import keras, keras_lp as lp
    >>> import keras_tuner
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> hypermodel = lp.TransferHyperModel(
    ...     backbone, 3, dropout=0.2, learning_rate=lambda hp: hp.Choice("rate", [1e-3, 1e-2])
    ... )
    >>> hp = keras_tuner.HyperParameters()
    >>> model = hypermodel.build(hp)
    >>> hp.values
    {'rate': 0.001, 'schedule': 'constant', 'hidden_units': 0}
    """

    def __init__(
        self,
        backbone: BackboneLike,
        task: TaskLike,
        *,
        learning_rate: Any = SEARCH,
        schedule: Any = SEARCH,
        hidden_units: Any = SEARCH,
        dropout: Any = SEARCH,
        name: str | None = None,
        tunable: bool = True,
        **arguments: Any,
    ) -> None:
        given = {
            "learning_rate": learning_rate,
            "schedule": schedule,
            "hidden_units": hidden_units,
            "dropout": dropout,
            **arguments,
        }
        super().__init__(transfer_model, backbone, as_task(task), given, _SPACES, name, tunable)
