"""What a client sends: the update of its local training, behind a defence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.audit.twin import gradients
from keras_lp.federated.engine.compression import Compression, Quantize, TopK
from keras_lp.privacy.differential_privacy import DifferentialPrivacy

Defense = str | Compression | DifferentialPrivacy | None
ALL: tuple[Defense, ...] = (
    *(None, "batch", "local_steps", Quantize(bits=1), TopK(0.01)),
    DifferentialPrivacy(noise_multiplier=1.0, delta=1e-5),
)


def check_defenses(defense: Any) -> list[Defense]:
    """Returns the defences of an argument in a list.

    Raises:
        ValueError: if one has no noise multiplier, or is unknown.
    """
    if isinstance(defense, str) and defense == "all":
        return list(ALL)
    defenses = list(defense) if isinstance(defense, (list, tuple)) else [defense]
    for one in defenses:
        known = one is None or isinstance(one, (Compression, DifferentialPrivacy))
        named = isinstance(one, str) and one in ("batch", "local_steps")
        if not (known or named):
            raise ValueError(
                '`defense` must be None, "batch", "local_steps", lp.Quantize, lp.TopK, '
                f'lp.DifferentialPrivacy, a list of these, or "all". Received: {one!r}.'
            )
        if isinstance(one, DifferentialPrivacy) and one.noise_multiplier is None:
            raise ValueError(
                "An audit needs the noise itself, which for an epsilon depends on the number of "
                f"clients and rounds. Received: {one!r}. Pass `noise_multiplier`, which "
                "`privacy_report()` of a federation states."
            )
    if not defenses:
        raise ValueError("`defense` must have at least one entry. Received: an empty list.")
    return defenses


def name_of(defense: Defense, batch: int, steps: int) -> str:
    """Returns how a report calls a defence."""
    if isinstance(defense, DifferentialPrivacy):
        clip = "" if defense.clip == "adaptive" else f", clip {defense.clip:g}"
        return f"noise multiplier {defense.noise_multiplier:g}{clip}"
    if isinstance(defense, Compression):
        return repr(defense)
    return {None: "none", "batch": f"batch of {batch}", "local_steps": f"{steps} local steps"}[
        defense
    ]


def update_of(
    model: Any, x: np.ndarray, y: np.ndarray, rate: float, steps: int, defense: Defense, seed: int
) -> list[np.ndarray]:
    """Returns the update that the server sees, divided by the learning rate and the steps.

    Without a defence and after one step, it is the gradient of the loss.

    Args:
        model: a compiled model.
        x: the inputs of the client.
        y: its labels.
        rate: the learning rate of SGD on the client.
        steps: number of local steps, each with all examples.
        defense: what is done to the update.
        seed: random seed of noise and rounding.
    """
    start = [tf.convert_to_tensor(variable) for variable in model.trainable_variables]
    weights = start
    for _ in range(steps):
        found = gradients(model, x, y, weights)
        weights = [w - tf.cast(rate * g, w.dtype) for w, g in zip(weights, found, strict=True)]
    update = [
        tf.cast(before - after, tf.float32) for before, after in zip(start, weights, strict=True)
    ]
    if isinstance(defense, Compression):
        update = defense.restored(update, tf.constant([seed, 0]))
    if isinstance(defense, DifferentialPrivacy):
        update = _with_noise(update, defense, np.random.default_rng(seed))
    return [np.asarray(one, "float64") / (rate * steps) for one in update]


def _with_noise(
    update: Sequence[Any], privacy: DifferentialPrivacy, rng: np.random.Generator
) -> list[Any]:
    """Returns an update as the sum of a round shows it to one who knows all other updates.

    The adaptive clipping norm is the norm of the update itself.
    """
    norm = float(tf.linalg.global_norm(update))
    clip = norm if privacy.clip == "adaptive" else float(privacy.clip)
    factor, scale = min(1.0, clip / max(norm, 1e-30)), (privacy.noise_multiplier or 0) * clip
    return [factor * np.asarray(one) + scale * rng.normal(size=one.shape) for one in update]
