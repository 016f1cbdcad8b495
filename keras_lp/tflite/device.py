"""Training on a device: the LiteRT runtime and NumPy, nothing else.

This file stands alone: copied to a device it needs neither keras_lp, Keras nor TensorFlow.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "version"

CHECKSUM = "sha256.txt"  # among the files behind the model, the digest of what is before them

Arrays = dict[str, np.ndarray]


class DeviceTrainer:
    """Runs and trains a file that `lp.export_trainable_tflite` wrote.

    On a device it is `ai_edge_litert` and this file alone: copy `keras_lp/tflite/device.py` and
    `from device import DeviceTrainer`. `docs/android.md` shows the same calls in Kotlin.

    Args:
        path: the `.tflite` file.
        num_threads: threads of the runtime. Defaults to 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged, or does not train.
        ImportError: `ai-edge-litert` is not installed.

    Example:

    ```python
    trainer = lp.DeviceTrainer("digits.tflite")
    trainer.fit(x, y, epochs=5)
    trainer.evaluate(x_held_out, y_held_out)      # {"loss": 0.21, "accuracy": 0.94}
    trainer.save_weights("update.npz")            # what a phone sends
    ```
    """

    def __init__(self, path: str | os.PathLike, *, num_threads: int = 1) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError(
                "DeviceTrainer needs the LiteRT runtime. Install it: pip install ai-edge-litert"
            ) from error
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"There must be a .tflite file. Received: path={str(path)!r}.")
        check_whole(path.read_bytes(), path)
        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=num_threads)
        except (ValueError, RuntimeError) as error:
            raise ValueError(_damaged(path, str(error))) from error
        names = self._interpreter.get_signature_list()
        wanted = {"infer", "train", "evaluate", "get_weights", "set_weights"}
        if not wanted <= names.keys():
            raise ValueError(
                f"DeviceTrainer takes a file with the signatures {sorted(wanted)}. Received: "
                f"{path} with {sorted(names)}. Write it with lp.export_trainable_tflite."
            )
        self._run = {name: self._interpreter.get_signature_runner(name) for name in names}
        self._train_inputs = self._run["train"].get_input_details()
        self.batch_size = int(self._train_inputs["mask"]["shape"][0])

    def fit(self, x: Any, y: Any, *, epochs: int = 1, shuffle: bool = True, seed: int = 0) -> list:
        """Trains, and returns the mean loss of each epoch.

        The last batch of an epoch is filled up with examples that do not count. Where the file
        has features, those of the frozen part are computed once.

        Args:
            x: examples, an array `(examples, ...)`, or a dict of them by input (`x_<name>`).
            y: class numbers `(examples,)` or one-hot labels `(examples, classes)`; soft labels,
                where the file was exported with them; or one number per label or unit. Missing
                labels as in Keras: -1, or NaN for numbers.
            epochs: passes over the examples. Defaults to 1.
            shuffle: whether each epoch has an order of its own. Defaults to True.
            seed: of the orders. Defaults to 0.

        Raises:
            ValueError: examples or labels of another shape, not finite, or outside the classes.
        """
        data = self._checked(x, y)
        train = self._run["train"]
        if "features" in self._run:
            rows = self._each("features", self._inputs(data))
            data = {"features": rows["features"], "y": data["y"]}
            train = self._run["train_features"]
        examples, losses = len(data["y"]), []
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            order = rng.permutation(examples) if shuffle else np.arange(examples)
            total = 0.0
            for batch, count in self._batches(data, order):
                total += float(train(**batch)["loss"]) * count
            losses.append(total / examples)
        return losses

    def predict(self, x: Any) -> np.ndarray:
        """Returns the outputs for examples: probabilities, or numbers."""
        (outputs,) = self._each("infer", self._inputs(self._checked(x))).values()
        return outputs

    def evaluate(self, x: Any, y: Any) -> dict[str, float]:
        """Returns the `loss` and the `accuracy` (`mae` for numbers) over examples.

        A loss of the user's own has no metric. The arguments are those of `fit`.
        """
        data = self._checked(x, y)
        sums: dict[str, float] = {}
        labels = 0.0
        for batch, _ in self._batches(data, np.arange(len(data["y"]))):
            results = {name: float(value) for name, value in self._run["evaluate"](**batch).items()}
            count = results.pop("count")
            labels += count
            for name, value in results.items():
                sums[name] = sums.get(name, 0.0) + value * count
        return {name: value / max(labels, 1.0) for name, value in sums.items()}

    def get_weights(self) -> Arrays:
        """Returns the weights by name, and under `"version"` that of the model they came from."""
        return {name: value.copy() for name, value in self._run["get_weights"]().items()}

    def set_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Takes up what `get_weights` or the server gave; the optimizer restarts.

        Raises:
            ValueError: weights of another model, of other names or shapes, or not finite.
        """
        reason = mismatch(weights, self._run["set_weights"].get_input_details())
        if reason is None:
            own, given = self._run["get_weights"]()[VERSION], np.asarray(weights[VERSION])
            half = len(own) // 2  # the first says which model, the second which round
            if not np.array_equal(own[:half], given[:half]):
                reason = "weights of another model"
        if reason is not None:
            raise ValueError(
                f"Weights must be those of this file's model. Received: {reason}. Load what "
                "lp.aggregate_device_updates gave for it."
            )
        self._run["set_weights"](**{name: np.asarray(value) for name, value in weights.items()})

    def save_weights(self, path: str | os.PathLike) -> None:
        """Writes `get_weights()` to an `.npz` file."""
        write_weights(path, self.get_weights())

    def load_weights(self, path: str | os.PathLike) -> None:
        """Takes up an `.npz` file, as `set_weights` does."""
        with np.load(path, allow_pickle=False) as archive:
            self.set_weights(dict(archive))

    def _checked(self, x: Any, y: Any = None) -> Arrays:
        data = dict(x) if isinstance(x, Mapping) else {"x": x}
        if y is not None:
            data["y"] = y
        wanted = {name for name in self._train_inputs if name != "mask"}
        wanted -= set() if y is not None else {"y"}
        if set(data) != wanted:
            raise ValueError(f"Inputs must be {sorted(wanted)}. Received: {sorted(data)}.")
        arrays = {name: self._fitted(name, value) for name, value in data.items()}
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) > 1 or not min(counts.values()):
            raise ValueError(
                "There must be as many labels as examples, one or more. Received: "
                f"{', '.join(f'{count} of {name}' for name, count in counts.items())}."
            )
        return arrays

    def _fitted(self, name: str, value: Any) -> np.ndarray:
        details = self._train_inputs[name]
        shape, dtype = tuple(int(n) for n in details["shape"][1:]), details["dtype"]
        array = np.asarray(value)
        if name == "y" and shape[-1:] == (1,) and array.ndim == len(shape):
            array = array[..., None]
        if name == "y" and np.issubdtype(dtype, np.integer) and array.ndim == len(shape) + 2:
            array = self._from_one_hot(array)
        if array.ndim == 0 or array.shape[1:] != shape:
            raise ValueError(
                f"`{name}` must have the shape (examples, {', '.join(map(str, shape))}). Received: "
                f"{name} of shape {array.shape}."
            )
        is_whole = np.issubdtype(dtype, np.integer)
        with np.errstate(invalid="ignore"):  # NaN as a whole number
            converted = array.astype(dtype)
        if is_whole and not np.array_equal(array, converted):
            raise ValueError(
                f"`{name}` must be whole numbers that fit {np.dtype(dtype).name}. Received: values "
                f"of {array.dtype}."
            )
        array = converted
        bad = np.isinf(array) if name == "y" else ~np.isfinite(array)
        if bad.any():
            raise ValueError(
                f"`{name}` must be finite. Received: {bad.sum()} values of {array.size} that are "
                "not. Drop or fill these examples."
            )
        if name == "y" and is_whole:
            self._check_classes(array)
        return array

    def _from_one_hot(self, y: np.ndarray) -> np.ndarray:
        """Returns class numbers for one-hot labels, -1 for a row of NaN or -1."""
        if y.shape[-1] == 1:
            return y[..., 0]
        with np.errstate(invalid="ignore"):
            missing = ~(y >= 0).all(-1)
        one_hot = np.isin(y, (0, 1)).all(-1) & (y.sum(-1) == 1)
        if not (missing | one_hot).all():
            raise ValueError(
                "Labels of this file are class numbers or one-hot. Received: y of shape "
                f"{y.shape} with other values. Export with soft_labels=True for soft labels."
            )
        return np.where(missing, -1, y.argmax(-1))

    def _check_classes(self, y: np.ndarray) -> None:
        (output,) = self._run["infer"].get_output_details().values()
        classes = int(output["shape"][-1])
        if y.size and not (y.min() >= -1 and y.max() < classes):
            raise ValueError(
                f"Labels must be class numbers from 0 to {classes - 1}, or -1 where the label is "
                f"missing. Received: labels from {y.min()} to {y.max()}."
            )

    def _inputs(self, data: Arrays) -> Arrays:
        return {name: array for name, array in data.items() if name != "y"}

    def _each(self, signature: str, inputs: Arrays) -> Arrays:
        """Runs a signature that takes one example on all of them."""
        count = len(next(iter(inputs.values())))
        rows = [
            self._run[signature](**{name: array[i : i + 1] for name, array in inputs.items()})
            for i in range(count)
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _batches(self, data: Arrays, order: np.ndarray) -> Any:
        """Yields `(batch, examples that count)`."""
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            filled = np.resize(chosen, self.batch_size)  # repeats them
            mask = (np.arange(self.batch_size) < len(chosen)).astype("float32")
            batch = {name: array[filled] for name, array in data.items()}
            yield {**batch, "mask": mask}, len(chosen)


def check_whole(content: bytes, path: str | os.PathLike) -> None:
    """Raises `ValueError` where a file of keras_lp does not agree with its checksum.

    Args:
        content: of the file. One without a checksum passes.
        path: the file, for the error.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if CHECKSUM not in archive.namelist():
                return
            start = min(one.header_offset for one in archive.infolist())
            told = {name: archive.read(name) for name in archive.namelist()}[CHECKSUM]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(_damaged(path, str(error))) from error
    if hashlib.sha256(content[:start]).hexdigest().encode() != told:
        raise ValueError(_damaged(path, "its checksum does not fit"))


def _damaged(path: str | os.PathLike, reason: str) -> str:
    return (
        f"A .tflite file must be whole. Received: {path}, which is damaged ({reason}). Copy or "
        "export it again."
    )


def mismatch(weights: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns what is wrong with weights; None where nothing is.

    Args:
        weights: arrays by name.
        wanted: for each name a dict of `shape` and `dtype`.
    """
    missing, unknown = sorted(wanted.keys() - set(weights)), sorted(set(weights) - wanted.keys())
    if missing or unknown:
        return f"weights without {missing[:3]}" if missing else f"unknown weights {unknown[:3]}"
    for name, details in wanted.items():
        array, shape = np.asarray(weights[name]), tuple(int(n) for n in details["shape"])
        if array.shape != shape or array.dtype != details["dtype"]:
            return (
                f"{name!r} of shape {array.shape} and {array.dtype}, where it is {shape} and "
                f"{np.dtype(details['dtype']).name}"
            )
        if not np.isfinite(array).all():
            return f"{name!r} with values that are not finite"
    return None


def write_weights(path: str | os.PathLike, weights: Mapping[str, np.ndarray]) -> None:
    """Writes weights to an `.npz` file; whoever reads it never sees half of it."""
    path = Path(path).expanduser()
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:  # given a name, NumPy would add ".npz"
            np.savez(file, **weights)
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"This file could not be written: {reason}", str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
