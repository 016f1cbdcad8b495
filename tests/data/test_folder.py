"""`load_folder`: files, labels and splits, with real digits as files."""

import csv
import os
import shutil
import struct
import wave

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.data.files import is_whole, read_images, read_sounds, wave_of
from keras_lp.data.splits import split_of

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def images():
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    return x[:300], y[:300]


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(image).numpy())


@pytest.fixture
def folder(images, tmp_path):
    """Zeros to fours, with one folder per digit."""
    for i, (image, digit) in enumerate(zip(*images, strict=True)):
        if digit < 5:
            write(tmp_path / "digits" / f"d{digit}" / f"{i:03d}.png", image)
    return tmp_path / "digits"


def load(path, split="train", **kwargs):
    return lp.load_folder(path, split=split, **{"image_size": 8, "channels": 1, **kwargs})


def test_every_file_is_in_one_split_with_its_pixels_and_label(folder, images):
    found = []
    for split in SPLITS:
        x, y = load(folder, split, batch_size=-1)
        assert x.dtype == np.uint8
        assert x.shape[1:] == (8, 8, 1)
        found += [(*image.ravel(), label) for image, label in zip(x, y, strict=True)]
    x, y = images
    expected = [(*image.ravel(), label) for image, label in zip(x, y, strict=True) if label < 5]
    assert sorted(found) == sorted(expected)


def test_attributes_and_batches(folder):
    dataset = load(folder, batch_size=16)
    assert dataset.class_names == ["d0", "d1", "d2", "d3", "d4"]
    assert dataset.broken == []
    images, labels = next(iter(dataset))
    assert images.shape == (16, 8, 8, 1)
    assert labels.dtype == tf.int64
    assert int(dataset.cardinality()) == len(list(dataset))
    assert len(set(labels.numpy())) > 2  # in random order
    single = load(folder, batch_size=None)
    np.testing.assert_array_equal(next(iter(single))[0], images[0])
    colour = load(folder, channels=3, image_size=(4, 6))
    assert next(iter(colour))[0].shape[1:] == (4, 6, 3)


def test_shares_are_those_of_a_hash_and_stay_when_files_are_added(folder, images):
    before = {split: load(folder, split, batch_size=-1) for split in SPLITS}
    write(folder / "d0" / "new.png", 255 - images[0][0])
    for split in SPLITS:
        x, _ = load(folder, split, batch_size=-1)
        old = {image.tobytes() for image in before[split][0]}
        new = {image.tobytes() for image in x}
        assert old <= new
        assert len(new - old) == (split == split_of("d0/new.png", 0.15, 0.15, 0))
    names = [f"{i}.png" for i in range(20_000)]
    chosen = [split_of(name, 0.1, 0.3, 5) for name in names]
    shares = [chosen.count(split) / 20_000 for split in SPLITS]
    np.testing.assert_allclose(shares, [0.6, 0.1, 0.3], atol=0.01)
    assert chosen != [split_of(name, 0.1, 0.3, 6) for name in names]
    kept = [i for i, one in enumerate(chosen) if one == "test"]
    more = [split_of(name, 0.2, 0.3, 5) for name in names]
    assert all(more[i] == "test" for i in kept)  # a larger validation split takes from training


def test_the_same_seed_gives_the_same_order(folder):
    first, again, other = (load(folder, batch_size=-1, seed=seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again
    assert sorted(first) != first
    assert other != first


def test_a_model_learns_from_a_folder_and_its_features_are_computed_once(folder):
    seen = []

    @keras.saving.register_keras_serializable("tests")
    class Look(keras.layers.Layer):
        def call(self, inputs):
            counted = tf.numpy_function(lambda x: seen.append(len(x)) or x, [inputs], inputs.dtype)
            counted.set_shape(inputs.shape)
            return counted

    layers = [keras.layers.Flatten(), Look(), keras.layers.Dense(32, "relu")]
    network = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Rescaling(1 / 255), *layers])
    train = load(folder)
    model = lp.transfer_model(network, train.class_names)
    seen.clear()
    history = model.fit(train, epochs=10, verbose=0)
    assert sum(seen) == len(load(folder, batch_size=-1)[1])
    assert history.history["accuracy"][-1] > 0.8
    assert lp.class_names(model) == {"predictions": train.class_names}


def test_broken_files_are_left_out_with_a_warning(folder, images):
    whole = {split: load(folder, split, batch_size=-1)[1] for split in SPLITS}
    good = next((folder / "d0").iterdir()).read_bytes()
    (folder / "d0" / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "d1" / "empty.jpg").write_bytes(b"")
    (folder / "d1" / "text.png").write_text("not an image")
    (folder / "d1" / "notes.txt").write_text("ignored: not an image file")
    for split in SPLITS:
        with pytest.warns(UserWarning, match="3 of .* files cannot be read and are left out"):
            dataset = load(folder, split)
        assert sorted(path.rsplit("/", 1)[1] for path in dataset.broken) == [
            *("cut.png", "empty.jpg", "text.png")
        ]
        assert sum(len(labels) for _, labels in dataset) == len(whole[split])


@pytest.mark.parametrize("form", ["png", "jpg", "bmp", "gif"])
def test_whole_and_cut_files_of_each_format(form, images, tmp_path):
    from PIL import Image

    path = tmp_path / f"image.{form}"
    big = np.repeat(np.repeat(images[0][0], 9, 0), 9, 1)[..., 0]
    Image.fromarray(big).save(path)
    assert is_whole(path)
    ((whole, _),) = read_images([str(path)], [0], big.shape, 1).as_numpy_iterator()
    assert np.abs(whole[..., 0].astype(int) - big).max() < (40 if form == "jpg" else 2)
    path.write_bytes(path.read_bytes()[:-100])
    assert not is_whole(path)


def test_the_same_content_in_two_splits_is_an_error(folder):
    files = sorted((folder / "d0").iterdir())
    source = next(f for f in files if split_of(f"d0/{f.name}", 0.15, 0.15, 0) == "train")
    names = (f"copy{i}.png" for i in range(100))
    inside = next(n for n in names if split_of(f"d0/{n}", 0.15, 0.15, 0) == "train")
    shutil.copy(source, folder / "d0" / inside)
    load(folder)  # a copy in the same split tells nothing
    outside = next(n for n in names if split_of(f"d0/{n}", 0.15, 0.15, 0) == "test")
    shutil.copy(source, folder / "d0" / outside)
    for split in SPLITS:
        with pytest.raises(ValueError, match=f"in one split only.*(?s:.*){outside}"):
            load(folder, split)


def table(folder, rows, header=("path", "digit", "width", "kind")):
    path = folder / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_table_has_several_tasks_and_missing_labels(images, tmp_path):
    rows = []
    for i, (image, digit) in enumerate(zip(*images, strict=True)):
        write(tmp_path / "files" / f"{i}.png", image)
        kind = "" if i % 3 == 0 else ["even", "odd"][digit % 2]
        width = "" if i % 5 == 0 else f"{i / 10}"
        rows.append([f"files/{i}.png", f"d{digit}", width, kind])
    path = table(tmp_path, rows)
    dataset = load(path, batch_size=None)
    assert dataset.class_names == {
        "digit": [f"d{i}" for i in range(10)], "kind": ["even", "odd"]
    }  # fmt: skip
    by_image = {
        image.tobytes(): (i, digit) for i, (image, digit) in enumerate(zip(*images, strict=True))
    }
    for image, labels in dataset.as_numpy_iterator():
        i, digit = by_image[image.tobytes()]
        assert labels["digit"] == digit
        assert labels["kind"] == (-1 if i % 3 == 0 else digit % 2)
        np.testing.assert_allclose(labels["width"], np.nan if i % 5 == 0 else i / 10, rtol=1e-6)
    one = load(path, labels=["kind"])
    assert one.class_names == ["even", "odd"]
    assert next(iter(one))[1].shape == (32,)
    numbers = load(path, labels=["width"])
    assert numbers.class_names is None
    assert next(iter(numbers))[1].dtype == tf.float32


def sound(path, samples, rate=8000, bits=2, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(bits)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, f"<i{bits}").tobytes())


def test_sounds_are_waves_padded_to_the_longest(tmp_path):
    rng = np.random.default_rng(0)
    written = {}
    for name in ("low", "high"):
        for i in range(20):
            wave_ = rng.integers(-32768, 32768, 100 + i)
            sound(tmp_path / name / f"{i}.wav", wave_)
            written[wave_[:100].tobytes()] = name, len(wave_)
    found = 0
    for split in SPLITS:
        dataset = load(tmp_path, split, batch_size=None)
        assert (dataset.sample_rate, dataset.class_names) == (8000, ["high", "low"])
        for samples, label in dataset.as_numpy_iterator():
            assert samples.shape == (119,)
            key = np.round(samples[:100] * 32768).astype("int64").tobytes()
            name, length = written[key]
            assert dataset.class_names[label] == name
            assert not samples[length:].any()
            found += 1
    assert found == 40
    stereo = tmp_path / "low" / "stereo.wav"
    sound(stereo, [1000, 3000] * 50, channels=2)
    x = [samples for s in SPLITS for samples, _ in load(tmp_path, s, batch_size=None)]
    assert sum(np.allclose(one[:50], 2000 / 32768) for one in x) == 1


def test_a_spectrogram_in_the_model_reaches_the_phone(tmp_path):
    time = np.arange(1600) / 8000
    rng = np.random.default_rng(0)
    for name, pitch in (("low", 300), ("high", 1200)):
        for i in range(30):
            tone = np.sin(2 * np.pi * (pitch + rng.normal(0, 30)) * time + i)
            sound(tmp_path / "tones" / name / f"{i}.wav", 9000 * tone + rng.normal(0, 900, 1600))
    data = {split: load(tmp_path / "tones", split) for split in SPLITS}
    wave_in = keras.Input((1600,))
    mel = keras.layers.MelSpectrogram(
        num_mel_bins=16, sampling_rate=8000, sequence_stride=128, fft_length=256
    )(wave_in)
    network = keras.Model(wave_in, keras.layers.Flatten()(mel))
    model = lp.transfer_model(network, data["train"].class_names)
    lp.fit_head(model, data["train"], l2=0.1, verbose=0)
    x, y = load(tmp_path / "tones", "test", batch_size=-1)
    report = lp.export_tflite(model, tmp_path / "tones.tflite", verification_data=(x, y))
    assert "accuracy 100.00%" in str(report)


def test_wrong_folders_and_tables(folder, images, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder or a CSV file"):
        load(tmp_path / "nothing")
    one = tmp_path / "one" / "cats"
    write(one / "a.png", images[0][0])
    with pytest.raises(ValueError, match=r"two or more classes.*\['cats'\]"):
        load(one.parent)
    with pytest.raises(ValueError, match="`validation` and `test` must leave"):
        load(folder, validation=0.5, test=0.5)
    with pytest.raises(ValueError, match="`test` must be a share"):
        load(folder, test=15)
    with pytest.raises(ValueError, match=r"`split` must be one of.*Did you mean 'validation'"):
        load(folder, "valid")
    with pytest.raises(ValueError, match="The split 'test' must have files"):
        load(folder, "test", test=0)
    with pytest.raises(ValueError, match="example in the training split"):
        load(folder, validation=0.0, test=0.99)
    (folder / "d9").mkdir()
    with pytest.warns(UserWarning, match=r"left out: \['d9'\]"):
        assert load(folder).class_names == ["d0", "d1", "d2", "d3", "d4"]
    (folder / "d9").rmdir()

    def refused(rows, message, **kwargs):
        path = table(tmp_path, rows, kwargs.pop("header", ("path", "kind")))
        with pytest.raises(ValueError, match=message):
            load(path, **kwargs)

    refused([], "a column of labels, and rows. Received: .* and 0 rows")
    refused([["one/cats/a.png"]], "a column of paths, a column of labels", header=("path",))
    refused([["one/cats/a.png", "x", "y"]], "needs 2 cells.*row 2 with 3")
    refused([["one/cats/b.png", "x"]], r"must exist.*\['one/cats/b.png'\]")
    refused([["one/cats/a.png", "x"]], "two or more classes. Received: 'kind' with")
    refused([["one/cats/a.png", "x"]], "Did you mean 'kind'", labels="knd")
    shutil.copy(one / "a.png", one / "b.png")
    pair = ["one/cats/a.png", "one/cats/b.png"]
    refused([[pair[0], "x"], [pair[0], "y"]], "Each path must be in one row.*'one/cats/a.png'")
    refused([[pair[0], "1"], [pair[1], "NA"]], "must be numbers or class names.*'kind'.*'NA'")
    both = [[pair[0], "x", "x"], [pair[1], "y", "y"]]
    refused(both, "different names", header=("path", "a b", "a-b"))
    loaded = table(tmp_path, [[f" {pair[0]}", "nan "], [pair[1], " inf"]], (" path", " kind"))
    shutil.copy(folder / "d0" / next(iter(os.listdir(folder / "d0"))), one / "b.png")
    assert load(loaded, labels="kind", validation=0, test=0).class_names == ["inf", "nan"]


def test_sample_rates_and_kinds_must_be_the_same(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for i in range(10):
            sound(tmp_path / name / f"{i}.wav", rng.integers(0, 99, 50))
    sound(tmp_path / "a" / "other.wav", rng.integers(0, 99, 50), rate=16000)
    with pytest.raises(ValueError, match=r"same sample rate. Received: .*Hz.*Hz"):
        load(tmp_path)
    (tmp_path / "a" / "other.wav").unlink()
    sound(tmp_path / "a" / "bits.wav", rng.integers(0, 99, 50), bits=4)
    with pytest.raises(ValueError, match=r"16-bit samples. Received: .*bits.wav with 32 bits"):
        load(tmp_path)
    (tmp_path / "a" / "bits.wav").unlink()
    write(tmp_path / "a" / "image.png", np.zeros((4, 4, 1), "uint8"))
    with pytest.raises(ValueError, match="all images or all sounds"):
        load(tmp_path)


def test_cameras_may_append_data_of_their_own(images, tmp_path):
    jpeg = tf.io.encode_jpeg(np.repeat(images[0][0], 3, -1)).numpy()
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg + b"SEFH" + bytes(5000))
    assert is_whole(path)
    ((image, _),) = read_images([str(path)], [0], (8, 8), 3).as_numpy_iterator()
    np.testing.assert_array_equal(image, tf.io.decode_jpeg(jpeg))


def test_wav_files_with_other_chunks_and_a_long_header(tmp_path):
    samples = np.arange(-50, 50).astype("<i2").tobytes()
    notes = b"LIST" + struct.pack("<I", 5) + b"notes\0"  # odd, with its padding
    form = struct.pack("<HHIIHH", 0xFFFE, 1, 8000, 16000, 2, 16) + bytes(24)
    chunks = [b"fmt " + struct.pack("<I", 40) + form, notes]
    body = b"WAVE" + b"".join(chunks) + b"data" + struct.pack("<I", 200) + samples
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert is_whole(path)
    wave_ = wave_of(path)
    assert (wave_.rate, wave_.samples) == (8000, 100)
    ((found, _),) = read_sounds([str(path)], [wave_], [0], 100).as_numpy_iterator()
    np.testing.assert_array_equal(found * 2**15, np.arange(-50, 50))


def test_other_formats_are_reported_and_hidden_files_ignored(folder):
    (folder / "d0" / "image.webp").write_bytes(b"RIFF")
    hidden = folder / "d0" / ".thumbnails"
    hidden.mkdir()
    shutil.copy(next(iter((folder / "d1").iterdir())), hidden / "copy.png")
    with pytest.warns(UserWarning, match="1 of .* left out: .*image.webp"):
        load(folder)
