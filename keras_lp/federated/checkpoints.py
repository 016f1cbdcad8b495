"""Checkpoints of a federation, from which a killed run can continue.

A file consists of its SHA-256 and a NumPy archive. It is written under a temporary name and then
renamed, so a file with its final name is complete unless the disk is damaged.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_lp.utils.files import whole_file
from keras_lp.utils.keras_internals import compile_arguments, sublayers
from keras_lp.utils.warn import warn

_KEPT = 3  # files: the newest, and older ones in case it is damaged
# Non-trainable variables that differ between runs of a program.
_OF_TRAINING = ("seed_generator_state", "input_mean", "input_scale", "class_weight")
State = tuple[int, list[np.ndarray], dict[str, Any]]


class Checkpoints:
    """The checkpoints of one federation in a folder.

    Args:
        directory: the folder, which is created if needed.
        settings: the settings that a checkpoint must match, JSON values by name.
        kept: number of newest files to keep; None keeps all. Defaults to 3.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        settings: dict[str, Any],
        kept: int | None = _KEPT,
    ) -> None:
        self._kept = kept
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._settings = json.loads(json.dumps(settings))

    def save(self, round_number: int, arrays: list[np.ndarray], about: dict[str, Any]) -> None:
        """Writes the state after a round and removes outdated files.

        Args:
            round_number: number of completed rounds.
            arrays: the state as arrays.
            about: the rest of the state, JSON values by name.
        """
        text = json.dumps({"settings": self._settings, "about": about, "round": round_number})
        buffer = io.BytesIO()
        numbered: dict[str, Any] = {f"array_{i}": array for i, array in enumerate(arrays)}
        np.savez(buffer, header=np.frombuffer(text.encode(), "uint8"), **numbered)
        content = buffer.getvalue()
        path = self._directory / f"round_{round_number:07d}.ckpt"
        with whole_file(path) as file:
            file.write(hashlib.sha256(content).digest() + content)
        outdated = self._files()[: -self._kept] if self._kept else []
        for old in (*outdated, *self._directory.glob("*.partial")):
            old.unlink(missing_ok=True)

    def earliest(self) -> int:
        """Returns the round of the oldest checkpoint, 0 if there is none."""
        files = self._files()
        return int(files[0].stem.split("_")[1]) if files else 0

    def load(self) -> State | None:
        """Returns the newest undamaged `(round_number, arrays, about)`, None if there is none.

        Warns about each damaged file that it skips.

        Raises:
            ValueError: a checkpoint is from another model or has other settings.
        """
        return next(self._whole(), None)

    def load_all(self) -> list[State]:
        """Returns all undamaged checkpoints in the format of `load`, newest first."""
        return list(self._whole())

    def _whole(self) -> Iterator[State]:
        for path in reversed(self._files()):
            try:
                header, arrays = _read(path)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                warn(f"The checkpoint {path} is damaged ({error}) and is skipped.")
                continue
            self._check(path, header["settings"])
            yield header["round"], arrays, header["about"]

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob("round_*.ckpt"))

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        names = {*found, *self._settings}
        others = sorted(n for n in names if found.get(n) != self._settings.get(n))
        if others:
            shown = ", ".join(
                f"{name}={_short(found.get(name))} (now {_short(self._settings.get(name))})"
                for name in others
            )
            raise ValueError(
                "The model and settings must be those that the checkpoint was written with. "
                f"Received: {path} with {shown}. Use another `checkpoint_dir`, or the previous "
                "settings."
            )


def describe_model(model: keras.Model, changing: Sequence[Any] = ()) -> dict[str, str]:
    """Returns digests that identify a model after a restart.

    They do not include names, which Keras numbers differently in each process, trainable weights,
    and label thresholds, which training does not use.

    Args:
        model: the model.
        changing: other variables that training changes. Defaults to none.
    """
    left_out = {id(variable) for variable in changing}
    layers = sublayers(model, include_self=False)
    shapes = [
        (tuple(v.shape), keras.backend.standardize_dtype(v.dtype), v.trainable)
        for v in model.weights
    ]
    config = {key: _plain(value) for key, value in compile_arguments(model).items()}
    names = {layer.name: f"#{i}" for i, layer in enumerate(layers)}
    structure = json.dumps(_without_names(model.get_config(), names), default=str, sort_keys=True)
    frozen = hashlib.sha256()
    for variable in model.non_trainable_variables:
        if variable.name not in _OF_TRAINING and id(variable) not in left_out:
            frozen.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return {
        "model": digest([structure, shapes]),
        "compiled": digest([config, _plain(model.optimizer)]),
        "frozen weights": frozen.hexdigest()[:16],
    }


def describe_optimizer(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Returns the class name of an optimizer and a digest of its settings."""
    config = {key: value for key, value in optimizer.get_config().items() if key != "name"}
    return [type(optimizer).__name__, digest(config)]


def _without_names(config: Any, names: dict[str, str]) -> Any:
    """Returns a config with numbers for layer names, and without seeds and the model name.

    Modules are left out too, because a class keeps its registered name when its file moves.
    """
    if isinstance(config, dict):
        return {
            key: _without_names(value, names)
            for key, value in config.items()
            if key not in ("module", "seed", "build_config", "compile_config", "thresholds")
            and not (key == "name" and value not in names)
        }
    if isinstance(config, (list, tuple)):
        return [_without_names(value, names) for value in config]
    return names.get(config, config) if isinstance(config, str) else config


def _plain(value: Any) -> Any:
    """Converts compiled settings to values that are the same in another process."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (keras.optimizers.Optimizer, keras.losses.Loss, keras.metrics.Metric)):
        own = value.get_config().items()
        # Callbacks may change the learning rate; the initial one is a separate setting.
        left_out = ("name", "learning_rate", "thresholds")
        config = {key: part for key, part in own if key not in left_out}
        return [type(value).__name__, json.dumps(config, default=_plain, sort_keys=True)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", type(value).__name__)


def digest(value: Any) -> str:
    """Returns a short digest of JSON values."""
    text = json.dumps(value, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    content = path.read_bytes()
    digest, archive = content[:32], content[32:]
    if hashlib.sha256(archive).digest() != digest:
        raise ValueError("its checksum does not match")
    with np.load(io.BytesIO(archive), allow_pickle=False) as stored:
        header = json.loads(stored["header"].tobytes())
        return header, [stored[f"array_{i}"] for i in range(len(stored.files) - 1)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
