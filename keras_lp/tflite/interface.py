"""What a phone file takes and gives: inputs and outputs of a model, by name and in order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_lp.model.model import input_structure
from keras_lp.tasks.heads import Head
from keras_lp.tasks.multi_label import MultiLabel
from keras_lp.tasks.task import ClassTask, Task


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of a model as its file gives it.

    Attributes:
        name: its name in the signature.
        task: what its head predicts; None where keras_lp made no head.
        activation: what the export adds to the model's own output.
        kind: `"classes"` (the largest entry is the answer), `"labels"` (each entry above its
            threshold is) or `"values"`.
    """

    name: str
    task: Task | None
    activation: str
    kind: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the entries, empty where nobody named them."""
        return self.task.class_names if isinstance(self.task, ClassTask) else ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of the entries, empty where nobody set them."""
        return (self.task.label_thresholds or ()) if isinstance(self.task, MultiLabel) else ()

    def activate(self, raw: np.ndarray) -> np.ndarray:
        """Adds the activation, in NumPy: a comparison must not stand on what it checks."""
        if self.activation == "softmax":
            exponentials = np.exp(raw - raw.max(axis=-1, keepdims=True))
            return exponentials / exponentials.sum(axis=-1, keepdims=True)
        return 1 / (1 + np.exp(-raw)) if self.activation == "sigmoid" else raw

    def decide(self, values: np.ndarray) -> np.ndarray:
        """The answers that probabilities stand for: class numbers, or a bool an entry."""
        if self.kind == "classes":
            return values.argmax(-1)
        return values > (np.array(self.thresholds) if self.thresholds else 0.5)


def outputs(model: keras.Model) -> list[Output]:
    """Describes the outputs of a model in the order of `call_flat`."""
    structure = None if isinstance(model, keras.Sequential) else model.output
    names = sorted(structure) if isinstance(structure, Mapping) else _output_names(model)
    described = []
    for name, tensor in zip(names, model.outputs, strict=True):
        layer = tensor._keras_history.operation
        task = layer.task if isinstance(layer, Head) else None
        activation = task.activation if task else "linear"
        last = activation if task else _last_activation(layer)
        kind = {"softmax": "classes", "sigmoid": "labels"}.get(last, "values")
        described.append(Output(name, task, activation, kind))
    return described


def input_names(model: keras.Model) -> list[str]:
    """The names of the inputs; "input" where the user gave none (Keras counts through)."""
    several = len(model.inputs) > 1
    return [
        (f"input_{i}" if several else "input")
        if re.fullmatch(r"keras_tensor(_\d+)?|input_layer(_\d+)?", tensor.name)
        else tensor.name
        for i, tensor in enumerate(model.inputs)
    ]


def call_flat(model: keras.Model, tensors: Sequence[Any]) -> list[Any]:
    """Calls a model on its inputs in order; returns its outputs in order."""
    packed = keras.tree.pack_sequence_as(input_structure(model), list(tensors))
    return keras.tree.flatten(model(packed, training=False))


def vocabulary_sizes(model: keras.Model) -> dict[int, int]:
    """How many ids an input may hold, by its number, for inputs that go into an `Embedding`."""
    model = getattr(model, "_functional", None) or model  # what a Sequential model holds
    own = {id(tensor): i for i, tensor in enumerate(model.inputs)}
    sizes: dict[int, int] = {}
    for operation in model.operations:
        for node in operation._inbound_nodes:
            for position, size in _ids_read(operation, len(node.input_tensors)).items():
                for tensor in _sources(node.input_tensors[position]):
                    if (index := own.get(id(tensor))) is not None:
                        sizes[index] = min(size, sizes.get(index, size))
    return sizes


def check_model(model: Any, taken_by: str = "export_tflite") -> None:
    """Raises unless a model can become a file: it knows its inputs, and they have sizes.

    Args:
        model: what was given.
        taken_by: the function, for the errors. Defaults to `"export_tflite"`.

    Raises:
        TypeError: anything else than a Keras model.
        ValueError: a model that is not built, names that a file cannot have, an open size.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"{taken_by} takes a Keras model. Received: "
            f"model={model!r} of type {type(model).__name__}."
        )
    if not model.built or not getattr(model, "inputs", None):
        raise ValueError(
            f"{taken_by} takes a model that knows its inputs. Received: model "
            f"{model.name!r} of type {type(model).__name__}, which does not. Build it as a "
            "Functional or Sequential model."
        )
    for name in [*input_names(model), *(output.name for output in outputs(model))]:
        if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
            raise ValueError(
                "Inputs and outputs of a .tflite file have names of letters, digits, dots and "
                f"underscores. Received: {name!r}. Build the model with other names."
            )
    for tensor in model.inputs:
        if None in tensor.shape[1:]:
            raise ValueError(
                "A .tflite file has inputs of one size. Received: input "
                f"{tensor.name!r} of shape {tuple(tensor.shape)}. Build the model with "
                "`input_shape`."
            )


def _last_activation(layer: Any) -> str:
    """The name of what gave an output: an activation, or a layer or operation that is one."""
    activation = getattr(layer, "activation", None)
    return getattr(activation, "__name__", type(layer).__name__).lower()


def _output_names(model: keras.Model) -> list[str]:
    counts: dict[str, int] = {}
    names = []
    for name in (tensor._keras_history.operation.name for tensor in model.outputs):
        counts[name] = counts.get(name, 0) + 1
        names.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return names


def _ids_read(operation: Any, arguments: int) -> dict[int, int]:
    """The number of ids that an operation may be given, by the position of the argument."""
    if isinstance(operation, keras.Model) and getattr(operation, "inputs", None):
        return vocabulary_sizes(operation)
    layers = operation._flatten_layers() if isinstance(operation, keras.Layer) else []
    found = [layer.input_dim for layer in layers if isinstance(layer, keras.layers.Embedding)]
    return dict.fromkeys(range(arguments), min(found)) if found else {}


def _sources(tensor: Any) -> list[Any]:
    """The tensor itself and all that it was computed from."""
    found, waiting = {}, [tensor]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            node = one._keras_history.operation._inbound_nodes[one._keras_history.node_index]
            waiting += node.input_tensors
    return list(found.values())
