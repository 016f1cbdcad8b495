"""Labels, vocabulary and normalisation in a file; MediaPipe as a client; the command line."""

import importlib.util
import io
import json
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_lp as lp
from keras_lp.tflite import contents
from keras_lp.tflite.__main__ import main
from keras_lp.tflite.contents import read_contents
from keras_lp.tflite.metadata.metadata import (
    label_files,
    read_labels,
    read_least_scores,
    with_files,
)
from tests.conftest import with_random_heads

Interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter

CLIENT = """
import json, sys
import mediapipe as mp, numpy as np
from mediapipe.tasks.python import BaseOptions, vision
options = vision.ImageClassifierOptions(base_options=BaseOptions(model_asset_path=sys.argv[1]))
with vision.ImageClassifier.create_from_options(options) as classifier:
    images = [mp.Image(mp.ImageFormat.SRGB, picture) for picture in np.load(sys.argv[2])]
    heads = [classifier.classify(image).classifications for image in images]
found = [[{c.category_name: c.score for c in head.categories} for head in one] for one in heads]
print(json.dumps(found))
"""


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype("uint8")


def network():
    layers = [
        keras.Input((16, 16, 3), name="picture"),
        keras.layers.Rescaling(1 / 127.5, -1),
        keras.layers.Conv2D(4, 3, strides=4, activation="relu"),
        keras.layers.Flatten(),
    ]
    return keras.Sequential(layers)


def exported(model, path, **options):
    """The contents of a file that is not run: these tests are about what is written."""
    lp.export_tflite(model, path, verify=False, **options)
    return read_contents(path.read_bytes())


# What is written


def test_labels_of_every_output_are_found_by_its_tensor(tmp_path):
    tasks = {"zebra": ["z", "y"], "ant": ["a", "b"], "tags": lp.MultiLabel(["t", "u"]),
             "value": lp.Regression()}  # fmt: skip
    path = tmp_path / "m.tflite"
    found = exported(lp.multitask_model(network(), tasks), path)
    labels = {tensor.name: found.labels(tensor) for tensor in found.outputs}
    assert labels == {"zebra": ["z", "y"], "ant": ["a", "b"], "tags": ["t", "u"], "value": []}
    with zipfile.ZipFile(path) as archive:  # where phone clients look
        assert archive.read("labels_zebra.txt") == b"z\ny"
    details = Interpreter(str(path)).get_output_details()
    shapes = {tuple(tensor.shape) for tensor in found.outputs}
    assert shapes == {tuple(one["shape"]) for one in details}


def test_one_output_has_its_labels_in_labels_txt(tmp_path):
    found = exported(lp.transfer_model(network(), ["Katze", "Köter"]), tmp_path / "m.tflite")
    assert found.files == {"labels.txt": "Katze\nKöter"}


def test_thresholds_are_the_least_scores_of_the_output(tmp_path):
    tags = lp.MultiLabel(["sun", "rain", "snow"], thresholds=[0.5, 1 / 3, 0.0123456789])
    more = lp.MultiLabel(["a", "b"])
    path = tmp_path / "m.tflite"
    found = exported(lp.multitask_model(network(), {"tags": tags, "more": more, "kind": 2}), path)
    thresholds = {tensor.name: found.thresholds(tensor) for tensor in found.outputs}
    assert thresholds == {"tags": list(tags.thresholds), "more": [], "kind": []}
    least = {tensor.name: tensor.metadata.least_score for tensor in found.outputs}
    assert least == {"tags": pytest.approx(0.0123456789), "more": None, "kind": None}
    with zipfile.ZipFile(path) as archive:  # where phone clients look
        lines = archive.read("thresholds_tags.txt").decode().split("\n")
    assert [line.split(",")[:3] for line in lines] == [["1", "1", "0"]] * 3
    assert [float(line.split(",")[3]) for line in lines] == list(tags.thresholds)


def test_thresholds_that_were_chosen_are_written_and_change_no_output(tmp_path, pictures):
    model = with_random_heads(lp.transfer_model(network(), lp.MultiLabel(["x", "y"])))
    plain = exported(model, tmp_path / "plain.tflite")
    assert plain.files == {"labels.txt": "x\ny"}
    thresholds = lp.choose_thresholds(model, (pictures, np.array([[0, 1], [1, 0], [0, 1]])))
    found = exported(model, tmp_path / "chosen.tflite")
    (output,) = found.outputs
    assert found.thresholds(output) == thresholds.tolist()
    results = [
        Interpreter(str(tmp_path / name)).get_signature_runner()(picture=pictures[:1].astype("f4"))
        for name in ("plain.tflite", "chosen.tflite")
    ]
    np.testing.assert_array_equal(*(result["predictions"] for result in results))
    model.save(tmp_path / "model.keras")  # the path of a file will do as well
    again = exported(tmp_path / "model.keras", tmp_path / "again.tflite")
    assert again.thresholds(again.outputs[0]) == thresholds.tolist()


def test_a_calibration_of_someone_else_has_no_thresholds():
    for text in ("", "1,1,0", "1,1,0,0.5\n", "1,1,0,0.5\n\n1,1,0,0.2", "1,1,0,x"):
        assert read_least_scores(text) == ([0.5] if text == "1,1,0,0.5\n" else [])


def test_raw_pictures_need_no_normalisation(tmp_path):
    (picture,) = exported(lp.transfer_model(network(), 2), tmp_path / "m.tflite").inputs
    assert (picture.metadata.channels, picture.metadata.mean, picture.metadata.std) == (3, 0.0, 1.0)


def test_normalisation_of_a_backbone_that_takes_scaled_pictures(tmp_path):
    metadata = lp.TFLiteMetadata(mean=127.5, std=127.5, description="Cats.")
    found = exported(lp.transfer_model(network(), 2), tmp_path / "m.tflite", metadata=metadata)
    (picture,) = found.inputs
    assert (picture.metadata.mean, picture.metadata.std) == (127.5, 127.5)


def test_the_vocabulary_belongs_to_the_input_of_ids(tmp_path):
    ids = keras.Input((5,), dtype="int32", name="ids")
    parts = keras.Input((5,), dtype="int32", name="parts")
    x = keras.layers.Embedding(4, 3)(ids) + keras.layers.Embedding(2, 3)(parts)
    model = lp.transfer_model(keras.Model({"parts": parts, "ids": ids}, x), 3)
    words = ["", "[UNK]", "cat", "dog"]
    metadata = lp.TFLiteMetadata(vocabulary=words)
    found = exported(model, tmp_path / "m.tflite", metadata=metadata)
    vocabularies = {tensor.name: tensor.metadata.vocabulary for tensor in found.inputs}
    assert vocabularies == {"ids": "vocab.txt", "parts": ""}
    assert found.files["vocab.txt"].split("\n") == words
    with pytest.raises(ValueError, match="5 tokens for 4 rows"):
        exported(
            model, tmp_path / "m.tflite", metadata=lp.TFLiteMetadata(vocabulary=[*words, "cow"])
        )


def test_metadata_do_not_change_what_the_file_computes(tmp_path, pictures):
    model = lp.transfer_model(network(), 3)
    exported(model, tmp_path / "with.tflite")
    found = exported(model, tmp_path / "without.tflite", metadata=False)
    assert found.files == {}
    assert found.inputs[0].metadata.name == ""
    results = [
        Interpreter(str(tmp_path / name)).get_signature_runner()(picture=pictures[:1].astype("f4"))
        for name in ("with.tflite", "without.tflite")
    ]
    np.testing.assert_array_equal(*(result["predictions"] for result in results))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = lp.transfer_model(network(), ["a", "b"])
    for name in ("a", "b"):
        exported(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metadata_that_would_not_fit_are_refused(tmp_path):
    path, model = tmp_path / "m.tflite", lp.transfer_model(network(), 2)
    with pytest.raises(ValueError, match=r"'a\\nb', which has a line break"):
        lp.TFLiteMetadata(vocabulary=["a\nb", "c"])
    with pytest.raises(ValueError, match="go into an Embedding"):
        lp.export_tflite(model, path, metadata=lp.TFLiteMetadata(vocabulary=["a"]))
    with pytest.raises(ValueError, match="'a' more than once"):
        lp.TFLiteMetadata(vocabulary=["a", "b", "a"])
    with pytest.raises(TypeError, match="list of strings"):
        lp.TFLiteMetadata(vocabulary="words")
    with pytest.raises(ValueError, match="std=0"):
        lp.TFLiteMetadata(std=0)
    with pytest.raises(TypeError, match=r"lp.TFLiteMetadata. Received: metadata={'a': 1}"):
        lp.export_tflite(model, path, metadata={"a": 1})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=6), min_size=2, max_size=5, unique=True))
def test_any_names_come_back_as_they_were(names):
    """Line breaks of all kinds, empty names, anything that Unicode has."""
    check_names(names)


def check_names(names):
    files = label_files("labels.txt", names)
    lines = files["labels.txt"].split("\n")
    assert len(lines) == len(names)
    assert all(line == name for line, name in zip(lines, names, strict=True) if is_line(name))
    # Other readers drop an empty last line, and nothing else.
    assert files["labels.txt"].splitlines() == (lines if lines[-1] else lines[:-1])
    packed = with_files(b"TFL3", files)
    assert read_labels(contents.associated_files(packed), "labels.txt") == names


def is_line(name):
    return len(name.splitlines()) == 1 and name.splitlines()[0] == name


def test_each_character_of_unicode_may_end_a_name():
    """In names of all characters there are, and next to an empty last one."""
    known = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    check_names([f"a{character}" for character in known])
    for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029":
        check_names([f"a{end}", "b"])
        check_names(["a", f"b{end}"])
        check_names([end, ""])
    check_names(["a", ""])


def test_half_a_surrogate_pair_is_no_name():
    with pytest.raises(ValueError, match=r"UTF-8 can hold. Received: 'a\\ud83d'"):
        lp.Classification(["a\ud83d", "b"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file to run and one that trains."""
    folder = tmp_path_factory.mktemp("written")
    model = lp.transfer_model(network(), ["a", "b"])
    lp.export_tflite(model, folder / "run.tflite", verify=False)
    lp.export_trainable_tflite(model, folder / "train.tflite")
    return {name: (folder / f"{name}.tflite").read_bytes() for name in ("run", "train")}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 0.9), bit=st.integers(0, 7), kind=st.sampled_from(["run", "train"]))
def test_a_flipped_bit_is_noticed_with_the_path(written, tmp_path, place, bit, kind):
    content = bytearray(written[kind])
    start = content.index(b"PK\x03\x04")  # of the files behind the model
    content[int(place * start)] ^= 1 << bit
    path = tmp_path / "damaged.tflite"
    path.write_bytes(content)
    reader = contents.inspect if kind == "run" else lp.DeviceTrainer
    with pytest.raises(ValueError, match=r"damaged\.tflite, which is damaged"):
        reader(path)


def test_broken_files_name_their_path(written, tmp_path, capsys):
    path = tmp_path / "short.tflite"
    path.write_bytes(written["train"][:5000])
    with pytest.raises(ValueError, match=r"short\.tflite"):
        lp.DeviceTrainer(path)
    path.write_bytes(written["run"][:1500])
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    assert "short.tflite" in capsys.readouterr().err
    path.write_bytes(written["run"])
    assert "sha256" not in contents.inspect(path)


def test_line_breaks_in_names_are_escaped_for_other_clients(mediapipe, tmp_path, pictures):
    names = ["a,b", "c\nd", "e\u2028f"]
    model = lp.transfer_model(network(), names)
    found = exported(model, tmp_path / "m.tflite")
    assert found.labels(found.outputs[0]) == names
    (scores,), *_ = mediapipe(tmp_path / "m.tflite", pictures)
    assert set(scores) == {"a,b", "c\\nd", "e\\u2028f"}


# A real client


@pytest.fixture(scope="session")
def mediapipe():
    """Runs `ImageClassifier` on a file and pictures, in a process of its own."""
    if importlib.util.find_spec("mediapipe") is None:
        pytest.skip("MediaPipe is not installed (extra dev, on Linux x86-64)")

    def classify(path, pictures):
        np.save(path.with_suffix(".npy"), pictures)
        command = [sys.executable, "-c", CLIENT, str(path), str(path.with_suffix(".npy"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return classify


def test_mediapipe_shows_the_labels_with_kerass_scores(mediapipe, tmp_path, pictures):
    names = ["cat", "dog", "bird"]
    model = lp.transfer_model(network(), names)
    exported(model, tmp_path / "m.tflite")
    expected = np.asarray(keras.ops.softmax(model(pictures.astype("float32"))))
    for (scores,), row in zip(mediapipe(tmp_path / "m.tflite", pictures), expected, strict=True):
        assert scores == pytest.approx(dict(zip(names, row, strict=True)), abs=1e-3)


def test_mediapipe_shows_every_task(mediapipe, tmp_path, pictures):
    model = lp.multitask_model(network(), {"kind": ["a", "b"], "tags": lp.MultiLabel(["x", "y"])})
    exported(model, tmp_path / "m.tflite")
    raw = model(pictures.astype("float32"))
    expected = {
        **dict(zip("ab", np.asarray(keras.ops.softmax(raw["kind"]))[0], strict=True)),
        **dict(zip("xy", np.asarray(keras.ops.sigmoid(raw["tags"]))[0], strict=True)),
    }
    first, *_ = mediapipe(tmp_path / "m.tflite", pictures)
    assert {k: v for head in first for k, v in head.items()} == pytest.approx(expected, abs=1e-3)


def test_mediapipe_shows_the_labels_above_their_thresholds_alone(mediapipe, tmp_path, pictures):
    names = ["a", "b", "c", "d"]
    model = with_random_heads(lp.transfer_model(network(), lp.MultiLabel(names)))
    scores = np.asarray(keras.ops.sigmoid(model(pictures.astype("float32"))))
    y = scores > np.median(scores, axis=0)
    lp.choose_thresholds(model, (pictures, y))
    exported(model, tmp_path / "m.tflite")
    answers = lp.decode_predictions(model, model.predict(pictures, verbose=0), top=None)
    assert len({len(answer) for answer in answers}) > 1
    for (shown,), answer in zip(mediapipe(tmp_path / "m.tflite", pictures), answers, strict=True):
        assert shown == pytest.approx(dict(answer), abs=1e-3)


# The command line


def test_inspect_prints_what_is_in_a_file(tmp_path, capsys):
    path = tmp_path / "m.tflite"
    lp.export_tflite(lp.transfer_model(network(), [f"n{i}" for i in range(20)]), path, verify=False)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    labels = ", ".join(f"n{i}" for i in range(12))
    for line in (
        f"size: {path.stat().st_size / 1024:.1f} KiB",
        "picture  float32[1, 16, 16, 3]  (pixel - 0) / 1",
        f"predictions  float32[1, 20]  labels {labels} and 8 more",
        "serving_default(picture) -> predictions",
        "CONV_2D ",
        "labels.txt, 20 lines",
    ):
        assert line in printed


def test_inspect_prints_thresholds_next_to_their_labels(tmp_path, capsys):
    path = tmp_path / "m.tflite"
    task = lp.MultiLabel(["sun", "snow"], thresholds={"snow": 0.123456})
    lp.export_tflite(lp.transfer_model(network(), task), path, verify=False)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "labels sun > 0.5, snow > 0.123\n" in printed
    assert "thresholds.txt, 2 lines" in printed


def test_inspect_finds_flex_operations_in_every_subgraph(tmp_path):
    def body(x):
        return (tf.linalg.cholesky(2 * x),)

    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec((2, 2), name="x")])
    def loop(x):
        return {"y": tf.while_loop(lambda x: x[0, 0] < 9, body, (x,))[0]}

    module.loop = loop
    functions = [loop.get_concrete_function()]
    converter = tf.lite.TFLiteConverter.from_concrete_functions(functions, module)
    converter.target_spec.supported_ops = [
        tf.lite.OpsSet.TFLITE_BUILTINS,
        tf.lite.OpsSet.SELECT_TF_OPS,
    ]
    content = converter.convert()
    assert contents.foreign_operations(content) == ["FlexCholesky"]
    found = read_contents(content)  # a file of someone else
    assert found.subgraphs == 3
    assert found.files == {}


def test_inspect_reports_files_that_it_cannot_read(tmp_path, capsys):
    path = tmp_path / "m.tflite"
    lp.export_tflite(lp.transfer_model(network(), 2), tmp_path / "whole.tflite", verify=False)
    cut = (tmp_path / "whole.tflite").read_bytes()[:500]
    for content, message in (
        (None, "No such file"),
        (b"PK\x03\x04zip", "identifier TFL3"),
        (b"", "TFL3"),
        (cut, "truncated or damaged"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", str(path)])
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err


def test_damaged_files_are_named_whatever_their_bytes_say(written, tmp_path, capsys):
    """Two bytes of a file without checksum are changed, as of one that somebody else wrote."""
    start = written["run"].index(b"PK\x03\x04")
    rng, path, messages = np.random.default_rng(0), tmp_path / "m.tflite", []
    for content in (written["run"], written["run"][:start]):
        for _ in range(400):
            damaged = bytearray(content)
            for place in rng.integers(8, len(damaged), 2):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                contents.inspect(path)
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > 400
    assert all("m.tflite" in message for message in messages)
    damaged = bytearray(written["run"])
    damaged[damaged.rindex(b"labels.txt", 0, damaged.rindex(b"PK\x01\x02"))] = ord("L")
    path.write_bytes(damaged)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(path)])
    assert stopped.value.code == 1
    assert "m.tflite, which is damaged" in capsys.readouterr().err


def test_associated_files_are_read_whatever_is_before_them():
    packed = io.BytesIO(b"before")
    packed.seek(0, 2)
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("labels.txt", "a\nb")
    assert contents.associated_files(packed.getvalue()) == {"labels.txt": "a\nb"}
