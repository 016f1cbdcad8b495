"""What do updates and models reveal about the data? A page of pictures for those who must know.

    python examples/privacy_audit.py            # needs no network; about a minute
    python examples/privacy_audit.py --quick    # fewer examples and shadow models

A network learns handwritten digits. Attacks read the pictures of clients from the updates that they
would send in a federation, without a defence and behind each. Others tell which pictures a model
was trained on, with and without differential privacy. The page is `runs/privacy_audit.html`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quiet import hide_machine_notes

if __name__ == "__main__":
    hide_machine_notes()

import keras
import numpy as np

import keras_lp as lp

OUT = Path("runs") / "privacy_audit.html"
CLIENTS, MEMBERS, SHADOWS = 6, 360, 8


def backbone(units: int) -> keras.Model:
    """Returns a small network with the same random weights each time."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten()]
    dense = keras.layers.Dense(units, "relu")
    return keras.Sequential([keras.Input((8, 8, 1)), *layers, dense])


def network() -> keras.Model:
    """Returns a model of which every layer trains."""
    return lp.transfer_model(backbone(64), 10, pretrained=False, trainable="all", optimizer="sgd")


def head(
    x: np.ndarray, y: np.ndarray, privacy: lp.DifferentialPrivacy | None = None
) -> keras.Model:
    """Returns a model with a trained head on random features, which remembers its examples."""
    model = lp.transfer_model(backbone(500), 10)
    lp.fit_head(model, (x, y), l2=1e-6, privacy=privacy, verbose=0)
    return model


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--quick", action="store_true", help="fewer examples, shadow models")
    quick = arguments.parse_args().quick
    clients, count, shadows = (2, 120, 2) if quick else (CLIENTS, MEMBERS, SHADOWS)
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x = x.astype("float32")
    updates = lp.audit_update_leakage(network(), x[:clients], y[:clients], defense="all")
    print(updates)
    members, others = ((x[start : start + count], y[start : start + count]) for start in (0, count))
    privacy = lp.DifferentialPrivacy(epsilon=4, delta=1e-3, clip=1.0)
    print(f"\nA head trained on {count} examples:")
    plain = lp.audit_membership(head(*members), members, others, train=head, shadow_models=shadows)
    print(plain)
    print("\nThe same with differential privacy, epsilon 4:")
    private = lp.audit_membership(
        head(*members, privacy),
        members,
        others,
        train=lambda x, y: head(x, y, privacy),
        shadow_models=shadows,
    )
    print(private)
    title = "Who was in the training data"
    updates.save(OUT, {title: plain, f"{title}, with differential privacy": private})
    print(f"\nPage: {OUT}")


if __name__ == "__main__":
    main()
