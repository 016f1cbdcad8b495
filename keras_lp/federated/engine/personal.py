"""Which variables of a model stay on the clients.

Arivazhagan et al., 2019, Federated Learning with Personalization Layers (FedPer, arXiv:1912.00818);
Li et al., 2021, FedBN: Federated Learning on Non-IID Features via Local Batch Normalization
(arXiv:2102.07623).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_lp.tasks.heads import heads
from keras_lp.utils.keras_internals import sublayers
from keras_lp.utils.names import near

PersonalLayers = Literal["head", "normalization"] | Sequence[str] | None
_NORMALIZATION = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)


class Personal:
    """The variables of a model by whether they stay on the clients.

    Args:
        model: a model.
        layers: `"head"`, `"normalization"`, names of layers, or None.
        error_feedback: whether clients also keep the part of their update that was not sent.
            Defaults to False.

    Attributes:
        is_own: whether each trainable variable of the model stays on the clients.
        shared: the trainable variables that are sent.
        trainable: those that stay on the clients.
        states: the non-trainable variables that training changes on the clients: the statistics of
            BatchNormalization.

    Raises:
        ValueError: if there is no such layer, or nothing is left to send.
    """

    def __init__(
        self, model: keras.Model, layers: PersonalLayers, error_feedback: bool = False
    ) -> None:
        self.error_feedback = error_feedback
        chosen = [] if layers is None else _chosen(model, layers)
        own = {id(variable) for layer in chosen for variable in layer.variables}
        variables = model.trainable_variables
        self.is_own = [id(variable) in own for variable in variables]
        self.shared = [v for v in variables if id(v) not in own]
        self.trainable = [v for v in variables if id(v) in own]
        self.states = [
            variable
            for layer in _batch_normalization(model)
            for variable in layer.non_trainable_variables
            if id(variable) in own
        ]
        if layers is None:
            return
        if not self.trainable:
            raise ValueError(
                "Personal layers must have trainable weights. Received: "
                f"personal_layers={layers!r}, whose layers are frozen or have none."
            )
        if not self.shared:
            raise ValueError(
                "Some trainable layers must be shared. Received: "
                f"personal_layers={layers!r}, which are all trainable layers of model "
                f"{model.name!r}."
            )

    @property
    def variables(self) -> list[Any]:
        """All variables that stay on the clients."""
        return [*self.trainable, *self.states]

    @property
    def known(self) -> int:
        """The number of values of `variables`."""
        return sum(int(np.prod(variable.shape)) for variable in self.variables)

    @property
    def size(self) -> int:
        """The number of values that a client keeps."""
        lost = sum(int(np.prod(variable.shape)) for variable in self.shared)
        return self.known + (lost if self.error_feedback else 0)

    def momenta(self, model: keras.Model) -> list[float]:
        """Returns the momenta of the statistics that train on clients."""
        return [layer.momentum for layer in _batch_normalization(model)] if self.states else []

    def values(self) -> np.ndarray:
        """Returns what a client keeps at first, float32 `(size,)`.

        These are the values of `variables` in the model, then zeros for what was not sent.
        """
        parts = [np.ravel(variable.numpy()).astype("float32") for variable in self.variables]
        lost = np.zeros(self.size - self.known, "float32")
        return np.concatenate([*parts, lost])

    def arrays(self, values: np.ndarray) -> list[np.ndarray]:
        """Returns the array of each of `variables` from `values`."""
        sizes = [int(np.prod(variable.shape)) for variable in self.variables]
        parts = np.split(values, np.cumsum(sizes))[:-1]
        return [
            part.reshape(variable.shape)
            for part, variable in zip(parts, self.variables, strict=True)
        ]

    def merge(self, shared: Sequence[Any], own: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the values of all trainable variables, in the order of the model."""
        rest = {True: iter(own), False: iter(shared)}
        return tuple(next(rest[is_own]) for is_own in self.is_own)

    def split(self, weights: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns the values of the shared and the personal trainable variables."""
        pairs = list(zip(self.is_own, weights, strict=True))
        return [w for own, w in pairs if not own], [w for own, w in pairs if own]


def untrainable_statistics(model: keras.Model, layers: PersonalLayers) -> list[str]:
    """Returns the names of trainable BatchNormalization layers that do not stay on the clients."""
    known = {id(variable) for variable in Personal(model, layers).states}
    return [
        layer.name
        for layer in _batch_normalization(model)
        if not {id(variable) for variable in layer.non_trainable_variables} <= known
    ]


def flat(tensors: Sequence[Any]) -> tf.Tensor:
    """Returns tensors as one float32 tensor `(size,)`."""
    parts = [tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors]
    return tf.concat([tf.zeros([0]), *parts], 0)


def _batch_normalization(model: keras.Model) -> list[Any]:
    return [
        layer
        for layer in sublayers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]


def _chosen(model: keras.Model, layers: PersonalLayers) -> list[Any]:
    inner = sublayers(model, include_self=False)
    if layers == "normalization":
        return [layer for layer in inner if isinstance(layer, _NORMALIZATION)]
    if layers == "head":
        known = heads(model)
        if not known:
            return [layer for layer in model.layers if layer.weights][-1:]
        hidden = tuple(f"{name}_hidden_" for name in known)
        return [
            layer for layer in model.layers if layer.name in known or layer.name.startswith(hidden)
        ]
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers or ()):
        raise ValueError(
            '`personal_layers` must be None, "head", "normalization" or a list of layer names. '
            f"Received: personal_layers={layers!r}."
        )
    names = [layer.name for layer in inner]
    for name in layers or ():
        if name not in names:
            raise ValueError(
                "`personal_layers` must be layers of the model. Received: "
                f"{name!r}.{near(name, names)}"
            )
    return [layer for layer in inner if layer.name in (layers or ())]
