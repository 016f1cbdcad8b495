"""Training on a device with only the LiteRT runtime and NumPy.

This file is self-contained: on a device it needs neither keras_lp, Keras nor TensorFlow.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

VERSION = "version"

CHECKSUM = "sha256.txt"  # associated file with the digest of the model before it

Arrays = dict[str, np.ndarray]

_HEADER = 4096  # maximum bytes of a stored array before its data


class DeviceTrainer:
    """Runs and trains a file that `lp.export_trainable_tflite` wrote.

    A device needs only `ai_edge_litert`, NumPy and this module: copy
    `keras_lp/tflite/device/device.py` and import it with `from device import DeviceTrainer`.
    `docs/android.md` shows the same calls in Kotlin.

    Args:
        path: path of the `.tflite` file.
        num_threads: number of threads of the runtime. Defaults to 1.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or is not trainable.
        ImportError: `ai-edge-litert` is not installed.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"])
    >>> report = lp.export_trainable_tflite(model, "sums.tflite", learning_rate=0.1)
    >>> x = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
    >>> trainer = lp.DeviceTrainer("sums.tflite")
    >>> losses = trainer.fit(x, x.sum(1) > 0, epochs=5)
    >>> losses[-1] < losses[0]
    True
    >>> sorted(trainer.evaluate(x, x.sum(1) > 0))
    ['accuracy', 'loss']
    >>> trainer.save_weights("update.npz")  # sent to the server
    """

    def __init__(self, path: str | os.PathLike[str], *, num_threads: int = 1) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError(
                "DeviceTrainer needs the LiteRT runtime. Install it: pip install ai-edge-litert"
            ) from error
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`path` must be an existing file. Received: {str(path)!r}.")
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

    def fit(
        self, x: Any, y: Any, *, epochs: int = 1, shuffle: bool = True, seed: int = 0
    ) -> list[float]:
        """Trains and returns the mean loss of each epoch, over the labels present as in Keras.

        The loss is NaN if there are no labels. The last batch of an epoch is padded with examples
        that do not count. If the file has the signature `features`, the frozen part runs only
        once per example.

        Args:
            x: examples, an array `(examples, ...)`, or a dict of arrays by input (`x_<name>`).
            y: class numbers `(examples,)` or one-hot labels `(examples, classes)`; soft labels, if
                the file was exported with `soft_labels=True`; or one number per label or unit.
                Missing labels are as in Keras: -1, or NaN for numbers.
            epochs: number of passes over the examples. Defaults to 1.
            shuffle: whether to shuffle the examples in each epoch. Defaults to True.
            seed: random seed of the shuffling. Defaults to 0.

        Raises:
            ValueError: examples or labels have the wrong shape, are not finite, or labels are
                outside the classes.
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
            results = [train(**batch) for batch in self._batches(data, order)]
            losses.append(_mean([(one["loss"], one["loss_weight"]) for one in results]))
        return losses

    def predict(self, x: Any) -> np.ndarray:
        """Returns the outputs for examples.

        Args:
            x: examples, as in `fit`.

        Returns:
            An array `(examples, classes)` of probabilities, or `(examples, units)` of values.

        Raises:
            ValueError: as in `fit`.
        """
        (outputs,) = self._each("infer", self._inputs(self._checked(x))).values()
        return outputs

    def evaluate(self, x: Any, y: Any) -> dict[str, float]:
        """Evaluates on examples.

        Args:
            x: examples, as in `fit`.
            y: labels, as in `fit`.

        Returns:
            A dict with the `loss`, and the `accuracy` or for numbers the `mae`. A custom loss has
            no metric. Without labels the values are NaN.

        Raises:
            ValueError: as in `fit`.
        """
        data = self._checked(x, y)
        run = self._run["evaluate"]
        results = [run(**batch) for batch in self._batches(data, np.arange(len(data["y"])))]
        means = {name: "count" for name in results[0] if name not in ("count", "loss_weight")}
        means["loss"] = "loss_weight"
        return {
            name: _mean([(one[name], one[weight]) for one in results])
            for name, weight in means.items()
        }

    def get_weights(self) -> Arrays:
        """Returns the weights.

        Returns:
            A dict of float32 arrays by name, and under `"version"` an int32 array `(8,)`, the
            version of the weights that training started from.
        """
        return {name: value.copy() for name, value in self._run["get_weights"]().items()}

    def set_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Sets weights from `get_weights` or from the server, and resets the optimizer.

        Raises:
            ValueError: the weights are from another model, have other names or shapes, or are not
                finite.
        """
        reason = mismatch(weights, self._run["set_weights"].get_input_details())
        if reason is None:
            own, given = self._run["get_weights"]()[VERSION], np.asarray(weights[VERSION])
            half = len(own) // 2  # the first identifies the model, the second the round
            if not np.array_equal(own[:half], given[:half]):
                reason = "weights from another model"
        if reason is not None:
            raise ValueError(
                f"Weights must match the model of this file. Received: {reason}. Load weights "
                "from lp.aggregate_device_updates for this model."
            )
        self._run["set_weights"](**{name: np.asarray(value) for name, value in weights.items()})

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Writes `get_weights()` to an `.npz` file."""
        write_weights(path, self.get_weights())

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Loads an `.npz` file and sets its weights with `set_weights`.

        Raises:
            OSError: the file does not exist or cannot be opened.
            ValueError: the file has other contents, or its weights do not match the model.
        """
        wanted = self._run["set_weights"].get_input_details()
        self.set_weights(read_arrays(path, {name: _bytes(one) for name, one in wanted.items()}))

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
                "`x` and `y` must have the same number of examples, at least one. Received: "
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
                f"`{name}` must have shape (examples, {', '.join(map(str, shape))}). Received: "
                f"{name} of shape {array.shape}."
            )
        is_whole = np.issubdtype(dtype, np.integer)
        with np.errstate(invalid="ignore"):  # NaN to integer
            converted = array.astype(dtype)
        if is_whole and not np.array_equal(array, converted):
            raise ValueError(
                f"`{name}` must be integers that fit {np.dtype(dtype).name}. Received: other "
                f"values of dtype {array.dtype}."
            )
        array = converted
        bad = np.isinf(array) if name == "y" else ~np.isfinite(array)
        if bad.any():
            raise ValueError(
                f"`{name}` must be finite. Received: {bad.sum()} of {array.size} values that are "
                "not. Drop or fill these examples."
            )
        if name == "y" and is_whole:
            self._check_classes(array)
        return array

    def _from_one_hot(self, y: np.ndarray) -> np.ndarray:
        """Returns class numbers for one-hot labels; -1 for rows with NaN or negative entries."""
        if y.shape[-1] == 1:
            return y[..., 0]
        with np.errstate(invalid="ignore"):
            missing = ~(y >= 0).all(-1)
        one_hot = np.isin(y, (0, 1)).all(-1) & (y.sum(-1) == 1)
        if not (missing | one_hot).all():
            raise ValueError(
                "Labels for this file must be class numbers or one-hot. Received: y of shape "
                f"{y.shape} with other values. Export with soft_labels=True for soft labels."
            )
        return np.where(missing, -1, y.argmax(-1))

    def _check_classes(self, y: np.ndarray) -> None:
        (output,) = self._run["infer"].get_output_details().values()
        classes = int(output["shape"][-1])
        if y.size and not (y.min() >= -1 and y.max() < classes):
            raise ValueError(
                f"Labels must be class numbers from 0 to {classes - 1}, or -1 for missing labels. "
                f"Received: labels from {y.min()} to {y.max()}."
            )

    def _inputs(self, data: Arrays) -> Arrays:
        return {name: array for name, array in data.items() if name != "y"}

    def _each(self, signature: str, inputs: Arrays) -> Arrays:
        """Runs a signature for single examples on all examples."""
        count = len(next(iter(inputs.values())))
        rows = [
            self._run[signature](**{name: array[i : i + 1] for name, array in inputs.items()})
            for i in range(count)
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _batches(self, data: Arrays, order: np.ndarray) -> Any:
        """Yields batches of fixed size with a mask of the examples that count."""
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            filled = np.resize(chosen, self.batch_size)  # repeats examples
            mask = (np.arange(self.batch_size) < len(chosen)).astype("float32")
            batch = {name: array[filled] for name, array in data.items()}
            yield {**batch, "mask": mask}


def _mean(pairs: list[tuple[Any, Any]]) -> float:
    """Returns the weighted mean of `(value, weight)` pairs; NaN if all weights are 0."""
    total = sum(float(weight) for _, weight in pairs)
    return sum(float(value) * float(weight) for value, weight in pairs) / total if total else np.nan


def _bytes(details: Mapping[str, Any]) -> int:
    return int(np.prod(details["shape"], dtype=np.int64)) * np.dtype(details["dtype"]).itemsize


def read_arrays(path: str | os.PathLike[str], sizes: Mapping[str, int] | None = None) -> Arrays:
    """Reads an `.npz` file from an untrusted source.

    Nothing is unpickled. Before any data are read, the sizes in the archive are checked against
    `sizes`, and the header of each array against its size in the archive.

    Args:
        path: path of the file.
        sizes: the maximum bytes of data of each array, by name. Defaults to None: arrays of any
            name and size.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: the file has anything but numeric arrays, or arrays with other names or larger
            sizes.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {one.filename.removesuffix(".npy"): one for one in archive.infolist()}
            for name, entry in entries.items():
                if sizes is None:
                    continue
                if name not in sizes:
                    raise ValueError(f"it has other arrays, such as {name[:80]!r}")
                if entry.file_size > sizes[name] + _HEADER:
                    raise ValueError(
                        f"{name!r} has {entry.file_size:,} bytes, expected {sizes[name]:,}"
                    )
            return {name: _read_array(archive, entry) for name, entry in entries.items()}
    except OSError:
        raise
    except Exception as error:  # malicious zip files and headers can raise anything
        reason = str(error) or type(error).__name__
        raise ValueError(
            "A weights file must be a complete .npz file of numeric arrays. Received: "
            f"{path}, which cannot be read ({reason[:200]}). Save or send it again."
        ) from error


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, by_columns, dtype = readers[version](file)
        size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
        if dtype.kind not in "biuf" or not 0 <= size <= entry.file_size:
            raise ValueError(f"{entry.filename[:80]!r} claims to be {dtype} of shape {shape}")
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{entry.filename[:80]!r} has other bytes than its {size:,} of numbers")
    order: Literal["F", "C"] = "F" if by_columns else "C"
    return np.frombuffer(content, dtype).reshape(shape, order=order).copy()


def check_whole(content: bytes, path: str | os.PathLike[str]) -> None:
    """Raises `ValueError` if a file does not match its checksum.

    Args:
        content: the bytes of the file. A file without a checksum passes.
        path: path of the file, for the error.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if CHECKSUM not in archive.namelist():
                return
            start = min(one.header_offset for one in archive.infolist())
            told = {name: archive.read(name) for name in archive.namelist()}[CHECKSUM]
    except Exception as error:  # damaged zip files can raise anything
        raise ValueError(_damaged(path, str(error) or type(error).__name__)) from error
    if hashlib.sha256(content[:start]).hexdigest().encode() != told:
        raise ValueError(_damaged(path, "its checksum does not match"))


def _damaged(path: str | os.PathLike[str], reason: str) -> str:
    return (
        f"A .tflite file must be complete. Received: {path}, which is damaged ({reason}). Copy or "
        "export it again."
    )


def mismatch(weights: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Describes the first mismatch of weights; returns None if there is none.

    Args:
        weights: arrays by name.
        wanted: a dict with the `shape` and `dtype` of each weight, by name.
    """
    missing, unknown = sorted(wanted.keys() - set(weights)), sorted(set(weights) - wanted.keys())
    if missing or unknown:
        return f"weights without {missing[:3]}" if missing else f"unknown weights {unknown[:3]}"
    for name, details in wanted.items():
        shape = tuple(int(n) for n in details["shape"])
        try:
            array = np.asarray(weights[name])
        except ValueError:  # a ragged list
            return f"{name!r}, which is not an array"
        if array.shape != shape or array.dtype != details["dtype"]:
            return (
                f"{name!r} of shape {array.shape} and dtype {array.dtype}, expected {shape} and "
                f"{np.dtype(details['dtype']).name}"
            )
        if not np.isfinite(array).all():
            return f"{name!r} with values that are not finite"
    return None


def write_weights(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray]) -> None:
    """Writes weights to an `.npz` file atomically."""
    path = Path(path).expanduser()
    partial = path.with_name(f".{path.name}.partial")
    arrays: dict[str, Any] = dict(weights)
    try:
        with partial.open("wb") as file:  # for a path, NumPy would add ".npz"
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"This file could not be written: {reason}", str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
