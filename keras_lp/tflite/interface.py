"""Inputs and outputs of a `.tflite` file: the names and order of those of the model."""

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
class Input:
    """An input of a model in its file.

    Attributes:
        name: its name in the signature.
        shape: the shape of an example, without the batch.
        dtype: the name of its dtype.
        ids: the number of ids if it goes into an `Embedding`, else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    ids: int | None


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of a model in its file.

    Attributes:
        name: its name in the signature.
        task: the task of its head; None if keras_lp did not build the head.
        activation: the activation that the export adds to the output of the model.
        kind: `"classes"` (the answer is the largest entry), `"labels"` (the answers are the
            entries above their threshold) or `"values"`.
    """

    name: str
    task: Task | None
    activation: str
    kind: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names; empty if there are none."""
        return self.task.class_names if isinstance(self.task, ClassTask) else ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of the entries; empty if there are none."""
        return (self.task.label_thresholds or ()) if isinstance(self.task, MultiLabel) else ()

    def activate(self, raw: np.ndarray) -> np.ndarray:
        """Applies the activation in NumPy, independent of the code under comparison."""
        if self.activation == "softmax":
            exponentials = np.exp(raw - raw.max(axis=-1, keepdims=True))
            return exponentials / exponentials.sum(axis=-1, keepdims=True)
        return 1 / (1 + np.exp(-raw)) if self.activation == "sigmoid" else raw

    def decide(self, values: np.ndarray) -> np.ndarray:
        """Returns the answers for probabilities: class numbers, or one bool per entry."""
        if self.kind == "classes":
            return values.argmax(-1)
        return values > (np.array(self.thresholds) if self.thresholds else 0.5)


@dataclasses.dataclass(frozen=True)
class Interface:
    """A model with its inputs and outputs as its file has them.

    Attributes:
        model: the model.
        inputs: its inputs, in the order of `model.inputs`.
        outputs: its outputs, in the order of `model.outputs`.
    """

    model: keras.Model
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs."""
        return [one.name for one in self.inputs]

    def call(self, tensors: Sequence[Any]) -> list[Any]:
        """Calls the model on a flat list of inputs; returns a flat list of outputs."""
        packed = keras.tree.pack_sequence_as(input_structure(self.model), list(tensors))
        return keras.tree.flatten(self.model(packed, training=False))


def describe(model: Any, taken_by: str = "export_tflite") -> Interface:
    """Checks that a model can be exported, and describes its inputs and outputs.

    Args:
        model: the argument of the user.
        taken_by: name of the calling function, for errors. Defaults to `"export_tflite"`.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: the model is not built, an input or output has a name that a file cannot have,
            or an input has an unknown size.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"{taken_by} takes a Keras model. Received: "
            f"model={model!r} of type {type(model).__name__}."
        )
    if not model.built or not getattr(model, "inputs", None):
        raise ValueError(
            f"{taken_by} takes a built model with known inputs. Received: model "
            f"{model.name!r} of type {type(model).__name__} without them. Build it as a "
            "Functional or Sequential model."
        )
    structure = None if isinstance(model, keras.Sequential) else model.output
    output_names = sorted(structure) if isinstance(structure, Mapping) else _output_names(model)
    for name in (*_input_names(model), *output_names):
        if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
            raise ValueError(
                "Input and output names of a .tflite file must consist of letters, digits, dots "
                f"and underscores. Received: {name!r}. Build the model with other names."
            )
    for tensor in model.inputs:
        if None in tensor.shape[1:]:
            raise ValueError(
                "The inputs of a .tflite file must have a fixed size. Received: input "
                f"{tensor.name!r} of shape {tuple(tensor.shape)}. Build the model with "
                "`input_shape`."
            )
    sizes = vocabulary_sizes(model)
    inputs = tuple(
        Input(name, tuple(tensor.shape[1:]), tensor.dtype, sizes.get(i))
        for i, (name, tensor) in enumerate(zip(_input_names(model), model.inputs, strict=True))
    )
    outputs = tuple(
        _describe_output(name, tensor._keras_history.operation)
        for name, tensor in zip(output_names, model.outputs, strict=True)
    )
    return Interface(model, inputs, outputs)


def _describe_output(name: str, layer: Any) -> Output:
    task = layer.task if isinstance(layer, Head) else None
    activation = task.activation if task else "linear"
    last = activation if task else _last_activation(layer)
    kind = {"softmax": "classes", "sigmoid": "labels"}.get(last, "values")
    return Output(name, task, activation, kind)


def vocabulary_sizes(model: keras.Model) -> dict[int, int]:
    """Returns the number of ids by input index, for inputs that go into an `Embedding`."""
    model = getattr(model, "_functional", None) or model  # inside a Sequential model
    own = {id(tensor): i for i, tensor in enumerate(model.inputs)}
    sizes: dict[int, int] = {}
    for operation in model.operations:
        for node in operation._inbound_nodes:
            for position, size in _ids_read(operation, len(node.input_tensors)).items():
                for tensor in _sources(node.input_tensors[position]):
                    if (index := own.get(id(tensor))) is not None:
                        sizes[index] = min(size, sizes.get(index, size))
    return sizes


def _input_names(model: keras.Model) -> list[str]:
    """Returns the input names; "input" replaces the numbered default names of Keras."""
    several = len(model.inputs) > 1
    return [
        (f"input_{i}" if several else "input")
        if re.fullmatch(r"keras_tensor(_\d+)?|input_layer(_\d+)?", tensor.name)
        else tensor.name
        for i, tensor in enumerate(model.inputs)
    ]


def _last_activation(layer: Any) -> str:
    """Returns the name of the last activation, or of the last layer or operation."""
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
    """Returns the number of ids that an operation accepts, by argument position."""
    if isinstance(operation, keras.Model) and getattr(operation, "inputs", None):
        return vocabulary_sizes(operation)
    layers = operation._flatten_layers() if isinstance(operation, keras.Layer) else []
    found = [layer.input_dim for layer in layers if isinstance(layer, keras.layers.Embedding)]
    return dict.fromkeys(range(arguments), min(found)) if found else {}


def _sources(tensor: Any) -> list[Any]:
    """Returns a tensor and all tensors that it is computed from."""
    found, waiting = {}, [tensor]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            node = one._keras_history.operation._inbound_nodes[one._keras_history.node_index]
            waiting += node.input_tensors
    return list(found.values())
