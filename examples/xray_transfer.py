"""An ImageNet network becomes a classifier of chest X-rays, with a thousand pictures.

    python examples/xray_transfer.py --weights mobilenet_2_5_224_tf_no_top.h5

Without `--weights` the ImageNet weights of MobileNet 0.25 are downloaded. The pictures are those of
pneumonia_mnist (TFDS), 28x28 and grey; the model resizes them to 96x96 and turns them into what
MobileNet takes. For comparison the same network learns from scratch, for as many epochs. One seed;
benchmarks/xray.py compares both over several, and with fewer pictures. `--quick` trains for two
epochs on 200 pictures.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from prepared import ended_without_data
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import train_test_split

import keras_lp as lp

NAMES = ["normal", "pneumonia"]
OUT = Path("runs/xray")


def scores(model: keras.Model, x: np.ndarray, y: np.ndarray) -> str:
    logits = model.predict(x, verbose=0)
    balanced = balanced_accuracy_score(y, logits.argmax(-1))
    auc = roc_auc_score(y, logits[:, 1] - logits[:, 0])
    return f"balanced accuracy {100 * balanced:.1f} %, AUC {100 * auc:.1f} %"


def normalisations(model: keras.Model) -> Iterator[keras.layers.BatchNormalization]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from normalisations(layer)
        elif isinstance(layer, keras.layers.BatchNormalization):
            yield layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="imagenet", help="weights file without its top")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two epochs on 200 pictures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.examples, arguments.epochs = 200, 2

    data = {
        split: lp.load_dataset(
            "pneumonia_mnist", split=split, batch_size=-1, data_dir=arguments.data_dir
        )
        for split in ("train", "val", "test")
    }
    x, y = data["train"]
    x, _, y, _ = train_test_split(
        x, y, train_size=arguments.examples, stratify=y, random_state=arguments.seed
    )
    weights = len(y) / (2 * np.bincount(y))  # three of four pictures show pneumonia
    training = {
        "epochs": arguments.epochs,
        "class_weight": dict(enumerate(weights)),
        "validation_data": data["val"],
        "verbose": 2,
    }

    ways = {
        "transfer": {"weights": arguments.weights, "learning_rate": 3e-3},
        "from scratch": {"weights": None, "trainable": "all", "learning_rate": 1e-2},
    }
    results = {}
    for way, options in ways.items():
        keras.utils.set_random_seed(arguments.seed)
        model = lp.transfer_model(
            "MobileNet",
            NAMES,
            input_shape=(28, 28, 1),
            image_size=96,
            backbone_kwargs={"alpha": 0.25},
            **options,
        )
        if way == "from scratch":  # its statistics follow: at Keras's 0.99 they lag by 100 steps
            for layer in normalisations(model):
                layer.momentum = 0.9
        print(f"\n{way}")
        lp.trainable_report(model)
        model.fit(x, y, **training)
        results[way] = scores(model, *data["test"])
        OUT.mkdir(parents=True, exist_ok=True)
        model.save(OUT / f"{way.replace(' ', '_')}.keras")

    print(f"\nTest split, {arguments.examples} training pictures, {arguments.epochs} epochs")
    for way, result in results.items():
        print(f"{way:<14}{result}")
    model = keras.models.load_model(OUT / "transfer.keras")
    print(lp.decode_predictions(model, model.predict(data["test"][0][:3], verbose=0)))


if __name__ == "__main__":
    with ended_without_data():
        main()
