"""`python -m keras_lp`: from a folder to a phone, with real digits as files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import keras_lp as lp
from keras_lp.__main__ import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of digits, a pretrained network and the model that `train` makes."""
    folder = tmp_path_factory.mktemp("command")
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    for i, (image, digit) in enumerate(zip(x[:400], y[:400], strict=True)):
        if digit in (3, 8):
            path = folder / "digits" / {3: "three", 8: "eight"}[digit] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tf.io.encode_png(np.repeat(image, 3, -1)).numpy())
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.Flatten()]
    network = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), *layers])
    network.save(folder / "network.keras")
    return folder


def run(files, *arguments):
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(files):
    command = [
        *("train", files / "digits", "--backbone", files / "network.keras", "--image-size", 8),
        *("--output", files / "model.keras", "--export", files / "phone.tflite", "--epochs", 1),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "keras_lp", *map(str, command)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(lp.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_prints_a_report_and_writes_a_verified_file(files, trained):
    assert re.search(r"class +train +validation +test\neight +\d+ +\d+ +\d+\nthree", trained)
    assert "Head solved with" in trained
    assert re.search(r"Fine-tuning: validation loss .*: (not )?kept\.", trained)
    right, count, shown = re.search(r"test split: (\d+)/(\d+) = ([\d.]+)", trained).groups()
    assert float(shown) == pytest.approx(int(right) / int(count), abs=5e-4)
    assert float(shown) > 0.8
    assert "compared with Keras on" in trained
    x, y = lp.load_folder(files / "digits", split="test", image_size=8, batch_size=-1)
    runner = Interpreter(str(files / "phone.tflite")).get_signature_runner()
    (name,) = runner.get_input_details()
    answers = [
        np.argmax(runner(**{name: image[None].astype("float32")})["predictions"]) for image in x
    ]
    assert np.mean(answers == y) == pytest.approx(int(right) / int(count))


def test_the_report_counts_by_hand(files, trained, capsys):
    assert run(files, "evaluate", files / "model.keras", files / "digits") == 0
    printed = capsys.readouterr().out
    x, y = lp.load_folder(files / "digits", split="test", image_size=8, batch_size=-1)
    model = keras.models.load_model(files / "model.keras")
    found = model.predict(x, verbose=0).argmax(-1)
    for number, name in enumerate(["eight", "three"]):
        own, said = y == number, found == number
        recall, precision = (own & said).sum() / own.sum(), (own & said).sum() / said.sum()
        row = rf"{name} +{own.sum()} +{recall:.3f} +{precision:.3f}"
        assert re.search(row, printed)
    assert printed.splitlines()[0] in trained


def test_predict_names_the_class(files, trained, capsys):
    paths = sorted((files / "digits" / "three").iterdir())[:3]
    assert run(files, "predict", files / "model.keras", *paths) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["file", "class", "probability"]
    model = keras.models.load_model(files / "model.keras")
    x = np.stack([keras.utils.img_to_array(keras.utils.load_img(path)) for path in paths])
    expected = lp.decode_predictions(model, model.predict(x, verbose=0))
    for row, path, ((name, probability),) in zip(rows[1:], paths, expected, strict=True):
        assert row == [str(path), name, f"{probability:.3f}"]


def test_export_and_report(files, trained, capsys):
    path = files / "small.tflite"
    command = ["export", files / "model.keras", path, "--quantization", "float16"]
    code = run(files, *command, "--folder", files / "digits")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "float16, outputs" in printed.out
    assert path.exists()
    assert run(files, "report", files / "model.keras") == 0
    printed = capsys.readouterr().out
    assert "predictions: eight, three" in printed
    assert "input: (None, 8, 8, 3)" in printed


def test_wrong_input_ends_with_2_and_one_line(files, trained, capsys, tmp_path):
    def refused(message, *arguments):
        assert run(files, *arguments) == 2
        printed = capsys.readouterr()
        assert re.search(message, printed.err), printed.err
        assert printed.err.startswith("error: ")
        assert "Traceback" not in printed.err

    refused("must be a folder", "train", tmp_path / "nothing")
    refused("model file must exist", "evaluate", tmp_path / "m.keras", files / "digits")
    refused("Did you mean 'MobileNet", "train", files / "digits", "--backbone", "MobilNet")
    refused("pass --folder", "export", files / "model.keras", "x.tflite", "--quantization", "int8")
    other = tmp_path / "other"
    for name in ("eight", "nine"):
        (other / name).mkdir(parents=True)
        for i, source in enumerate(sorted((files / "digits" / "eight").iterdir())):
            data = source.read_bytes() + name.encode()
            (other / name / f"{i}.png").write_bytes(data)
    refused("classes of the model", "evaluate", files / "model.keras", other)
    refused("must end in .keras", "train", files / "digits", "--output", tmp_path / "out")
    backbone = keras.models.load_model(files / "network.keras")
    lp.multitask_model(backbone, {"a": 2, "b": 2}).save(tmp_path / "both.keras")
    refused(r"classifies images.*\['a', 'b'\]", "report", tmp_path / "both.keras")
    broken = tmp_path / "broken"
    shutil.copytree(files / "digits", broken)
    for path in broken.rglob("*.png"):
        data = bytearray(path.read_bytes())
        data[40:60] = bytes(20)
        path.write_bytes(data)
    refused("Invalid PNG", "evaluate", files / "model.keras", broken)
    with pytest.raises(SystemExit) as caught:
        run(files, "trian", "x")
    assert caught.value.code == 2


def test_help_has_an_example(capsys):
    for command in ([], ["train"], ["evaluate"], ["predict"], ["export"], ["report"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
        assert "python -m keras_lp train pets/" in capsys.readouterr().out


@pytest.mark.parametrize("tuned", [0.01, 9.0])
def test_the_better_of_both_phases_is_kept(tuned, files, trained, capsys, tmp_path, monkeypatch):
    def worse(model, *args, **kwargs):
        for weight in model.weights:
            weight.assign(weight * 0)
        history = keras.callbacks.History()
        history.history = {"val_loss": [tuned]}
        return history

    monkeypatch.setattr(lp, "fit_two_phase", worse)
    command = ["train", files / "digits", "--backbone", files / "network.keras"]
    assert run(files, *command, "--image-size", 8, "--output", tmp_path / "m.keras") == 0
    model = keras.models.load_model(tmp_path / "m.keras")
    assert any(np.any(weight) for weight in model.get_weights()) == (tuned == 9.0)
    assert ("not kept" in capsys.readouterr().out) == (tuned == 9.0)


def test_evaluate_uses_the_files_that_training_held_out(files, tmp_path, capsys):
    command = ["train", files / "digits", "--backbone", files / "network.keras", "--seed", 7]
    command += ["--image-size", 8, "--epochs", 0, "--output", tmp_path / "sub" / "m.keras"]
    assert run(files, *command) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Accuracy"))
    assert run(files, "evaluate", tmp_path / "sub" / "m.keras", files / "digits") == 0
    assert capsys.readouterr().out.splitlines()[0] == line
