"""Averages low-rank adapters exactly.

The mean of the products A B of clients is not the product of the mean A and the mean B. The rest is
added to the frozen kernels. Singhal et al., 2024, FedEx-LoRA: Exact Aggregation for Federated and
Efficient Fine-Tuning of Foundation Models (arXiv:2410.09432).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import keras
import numpy as np
import tensorflow as tf

from keras_lp.federated.engine.personal import Personal, PersonalLayers
from keras_lp.model.adapters import adapted_layers, adapters_of
from keras_lp.utils.arguments import check_choice
from keras_lp.utils.keras_internals import own_variables

LoRAAveraging = Literal["exact", "separate"]
ALL_RANKS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Pair:
    """The adapters of a layer.

    Attributes:
        kernel: the frozen variable to which they are added.
        scale: the factor of A B.
        a: the index of A among the shared trainable variables.
        b: the index of B.
    """

    kernel: Any
    scale: float
    a: int
    b: int


class Adapters:
    """The adapters of a model that clients share.

    Args:
        model: the model.
        personal: which variables stay on the clients.

    Attributes:
        pairs: the adapters of each layer.
        rank: the largest rank, 0 without adapters.
    """

    def __init__(self, model: keras.Model, personal: Personal) -> None:
        places = {id(variable): i for i, variable in enumerate(personal.shared)}
        self.pairs: list[Pair] = []
        self.rank = 0
        self._axes: dict[int, int] = {}  # the axis of the rank of each adapter, by its id
        for layer in adapted_layers(model):
            adapted: Any = layer
            a, b = adapters_of(layer)
            self.rank = max(self.rank, adapted.lora_rank)
            self._axes |= {id(a): len(a.shape) - 1, id(b): 0}
            kernel = next(v for v in own_variables(layer) if v.name in ("kernel", "embeddings"))
            if id(a) in places and id(b) in places:
                scale = adapted.lora_alpha / adapted.lora_rank
                self.pairs.append(Pair(kernel, scale, places[id(a)], places[id(b)]))

    @property
    def kernels(self) -> list[Any]:
        """The frozen variables to which the adapters are added."""
        return [pair.kernel for pair in self.pairs]

    def within_rank(
        self, variables: Sequence[Any], start: Sequence[Any], weights: Sequence[Any], rank: Any
    ) -> list[Any]:
        """Returns weights of which the adapters changed in their first entries along the rank only.

        A client with a lower rank trains these, and adds the others to its frozen kernel.

        Args:
            variables: the trainable variables.
            start: their values before training.
            weights: their values after it.
            rank: the rank of the client.
        """
        found = []
        for variable, before, after in zip(variables, start, weights, strict=True):
            axis = self._axes.get(id(variable))
            if axis is not None:
                shape = [1] * len(variable.shape)
                shape[axis] = variable.shape[axis]
                trained = tf.reshape(tf.range(variable.shape[axis]) < rank, shape)
                after = tf.where(trained, after, before)
            found.append(after)
        return found

    def shapes(self, variables: Sequence[Any], rank: int) -> list[tuple[int, ...]]:
        """Returns the shapes of the variables that a client of a rank sends."""
        found = []
        for variable in variables:
            shape, axis = list(variable.shape), self._axes.get(id(variable))
            if axis is not None:
                shape[axis] = min(shape[axis], rank)
            found.append(tuple(shape))
        return found

    def part(self, weights: Sequence[tf.Tensor], shares: Sequence[tf.Tensor]) -> Any:
        """Returns the contribution of a client to the sums over clients, in a graph.

        Args:
            weights: its shared weights after training.
            shares: its share in the mean of each of them.
        """
        sums = []
        for pair in self.pairs:
            a, b = (tf.cast(weights[i], tf.float32) for i in (pair.a, pair.b))
            share = shares[pair.a]
            sums.append(
                collections.OrderedDict(
                    product=share * tf.matmul(a, b), a=share * a, b=share * b, share=share
                )
            )
        return tuple(sums)

    def fold(self, sums: Sequence[Any]) -> None:
        """Adds to each kernel what the product of the means lacks."""
        for pair, one in zip(self.pairs, sums, strict=True):
            if one["share"] > 0:
                product, a, b = (
                    np.asarray(one[name]) / one["share"] for name in ("product", *"ab")
                )
                pair.kernel.assign_add(pair.scale * (product - a @ b))

    def bytes_down(self) -> int:
        """Returns the bytes of the kernels, which a client receives."""
        return sum(4 * int(np.prod(kernel.shape)) for kernel in self.kernels)


def check_lora(
    model: keras.Model,
    personal_layers: PersonalLayers,
    averaging: LoRAAveraging,
    ranks: Mapping[Hashable, int] | None,
    possible: bool,
) -> bool:
    """Returns whether the product of adapters is averaged exactly.

    Args:
        model: the model.
        personal_layers: the layers that stay on the clients.
        averaging: the argument `lora_averaging`.
        ranks: the argument `lora_ranks`.
        possible: whether the means of all updates are published without noise.

    Raises:
        ValueError: if the model has no adapters, they cannot be averaged exactly, or a rank is out
            of range.
    """
    adapters = Adapters(model, Personal(model, personal_layers))
    check_choice("lora_averaging", averaging, get_args(LoRAAveraging))
    if (averaging == "exact" or ranks) and not adapters.rank:
        raise ValueError(
            "`lora_ranks` and exact averaging need a model with adapters. Received: model "
            f"{model.name!r} without any. Build it with lp.finetune_model(..., lora=lp.LoRA())."
        )
    wrong = {
        client: rank
        for client, rank in (ranks or {}).items()
        if not isinstance(rank, (int, np.integer)) or not 1 <= rank <= adapters.rank
    }
    if wrong:
        raise ValueError(
            f"`lora_ranks` must be integers from 1 to {adapters.rank}, the rank of the model. "
            f"Received: {dict(list(wrong.items())[:5])}."
        )
    wrong_types = [k.path for k in adapters.kernels if not keras.backend.is_float_dtype(k.dtype)]
    if averaging == "exact" and wrong_types:
        raise ValueError(
            "Exact averaging adds to the frozen kernels, which must be floating-point numbers. "
            f'Received: {wrong_types[:3]}. Pass lora_averaging="separate".'
        )
    if averaging == "exact" and not (possible and adapters.pairs):
        raise ValueError(
            "Exact averaging needs shared adapters, the mean of the updates, and no noise. "
            'Received: lora_averaging="exact" with `privacy`, a robust `aggregation` or personal '
            "adapters. Leave it out."
        )
    return averaging == "exact"
