import sys

import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.data import tfds as datasets


def test_digits_are_real_disjoint_and_whole():
    from sklearn.datasets import load_digits

    parts = [lp.load_dataset("digits", split=split, batch_size=-1) for split in ("train", "test")]
    (x, y), (x_test, y_test) = parts
    assert x.shape == (1437, 8, 8, 1)
    assert x_test.shape == (360, 8, 8, 1)
    assert x.dtype == np.uint8
    assert x.max() == 255
    # 0..255 keeps the 17 grey values of 0..16, so the pictures are those of scikit-learn
    ours = np.round(np.concatenate([x, x_test]).reshape(-1, 64) * (16 / 255)).astype(int)
    theirs = load_digits()
    ours = sorted(map(tuple, np.column_stack([ours, np.concatenate([y, y_test])])))
    expected = sorted(map(tuple, np.column_stack([theirs.data.astype(int), theirs.target])))
    assert ours == expected
    np.testing.assert_allclose(np.bincount(y_test) / 360, np.bincount(y) / 1437, atol=0.005)


def test_batch_size_gives_examples_batches_or_arrays():
    single = lp.load_dataset("digits", split="test", batch_size=None)
    batched = lp.load_dataset("digits", split="test", batch_size=50)
    x, y = lp.load_dataset("digits", split="test", batch_size=-1)
    assert single.element_spec[0].shape == (8, 8, 1)
    assert [len(labels) for _, labels in batched] == [50] * 7 + [10]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batched]), y)
    np.testing.assert_array_equal(next(iter(single))[0], x[0])


@pytest.mark.parametrize(
    ("name", "split", "count", "labels"),
    [
        ("mnist", "test", 10000, None),
        ("fashion_mnist", "train[:10%]", 6000, None),
        ("cmaterdb/bangla", "test", 1000, None),
        ("pneumonia_mnist", "val", 524, None),
        ("glue/sst2", "validation", 872, None),
        ("trec", "test", 500, {"label_coarse", "label_fine"}),
        ("clinc_oos", "validation", 3000, {"domain", "intent"}),
    ],
)
def test_tfds_data_sets_come_as_input_and_labels(tfds_dir, name, split, count, labels):
    dataset = lp.load_dataset(name, split=split, data_dir=tfds_dir, batch_size=None, download=False)
    assert dataset.cardinality() == count
    x, y = next(iter(dataset))
    assert x.dtype == (tf.uint8 if len(x.shape) == 3 else tf.string)
    assert (set(y) if labels else None) == labels
    assert {tensor.dtype for tensor in tf.nest.flatten(y)} == {tf.int64}


def test_the_environment_variable_says_where_the_data_are(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    x, _ = lp.load_dataset("pneumonia_mnist", split="val", batch_size=-1, download=False)
    assert x.shape == (524, 28, 28, 1)


def test_a_real_data_set_trains_and_federates(tfds_dir, mlp):
    x, y = lp.load_dataset(
        "pneumonia_mnist", split="val", data_dir=tfds_dir, batch_size=-1, download=False
    )
    assert np.bincount(y).tolist() == [135, 389]
    import keras

    backbone = keras.Sequential(
        [keras.Input((28, 28, 1)), keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 5, 4)]
    )
    model = lp.transfer_model(backbone, ["normal", "pneumonia"])
    lp.FederatedAveraging(model).fit(lp.partition((x, y), 4, alpha=0.5), 1, verbose=0)
    model.fit(
        lp.load_dataset("pneumonia_mnist", split="val", data_dir=tfds_dir, batch_size=32), verbose=0
    )
    assert model.predict(x, verbose=0).shape == (524, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fashion_mnst", "split": "train"}, "Did you mean 'fashion_mnist'"),
        ({"name": "digits", "split": "tst"}, r"\['train', 'test'\].*Did you mean 'test'"),
        ({"name": "digits", "split": "test", "batch_size": 0}, "batch_size=0"),
    ],
)
def test_unknown_names_and_splits_list_the_near_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.load_dataset(**arguments)


def test_data_sets_without_class_labels_are_refused(tfds_dir):
    for name in ("tiny_shakespeare", "tatoeba/tatoeba_de"):
        with pytest.raises(ValueError, match="needs to know which"):
            lp.load_dataset(name, split="train", data_dir=tfds_dir, download=False)
    with pytest.raises(ValueError, match=r"'val'.*Did you mean"):
        lp.load_dataset("mnist", split="val", data_dir=tfds_dir, download=False)


def test_a_data_set_that_is_not_there_is_not_downloaded_silently(tmp_path):
    with pytest.raises(ValueError, match="must be prepared"):
        lp.load_dataset("mnist", split="train", data_dir=tmp_path, download=False)


def test_without_a_network_a_download_fails_at_once(tmp_path, monkeypatch):
    def refuse(address, timeout):
        assert timeout <= 30
        raise OSError("unreachable")

    monkeypatch.setattr(datasets.urllib.request, "getproxies", dict)
    monkeypatch.setattr(datasets.socket, "create_connection", refuse)
    with pytest.raises(ConnectionError, match=r"mnist.*unreachable.*TFDS_DATA_DIR"):
        lp.load_dataset("mnist", split="train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("module", "name"), [("sklearn", "digits"), ("tensorflow_datasets", "mnist")]
)
def test_missing_packages_say_what_to_install(monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"keras_lp\[data\]"):
        lp.load_dataset(name, split="train")


def tiny(tmp_path, features, examples):
    """Writes a TFDS data set with one split."""
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": list(enumerate(examples))},
        data_dir=tmp_path,
        disable_shuffling=True,
    )
    return {"name": "tiny", "split": "train", "data_dir": tmp_path, "download": False}


def test_multi_label_sequences_and_numbers(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 1)),
        "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["sea", "sky", "sun"])),
        "height": tfds.features.Scalar(np.float64),
        "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
        "sort": tfds.features.ClassLabel(names=["a", "b"]),
    }
    examples = [
        {
            "image": np.full((4 + i, 6, 1), 40 * i, "uint8"),
            "tags": [[], [0, 2], [1], [2, 2, 1]][i],
            "height": i / 2,
            "box": np.arange(4, dtype="float32") + i,
            "sort": i % 2,
        }
        for i in range(4)
    ]
    given = {**tiny(tmp_path, features, examples), "inputs": "image"}
    dataset = lp.load_dataset(**given, labels="tags", batch_size=None)
    assert dataset.class_names == ["sea", "sky", "sun"]
    assert [labels.tolist() for _, labels in dataset.as_numpy_iterator()] == [
        [0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 1, 1]
    ]  # fmt: skip
    several = lp.load_dataset(**given, labels=["tags", "height", "sort"], batch_size=None)
    assert several.class_names == {"tags": ["sea", "sky", "sun"], "sort": ["a", "b"]}
    assert [labels["height"] for _, labels in several.as_numpy_iterator()] == [0, 0.5, 1, 1.5]
    box = lp.load_dataset(**given, labels="box", batch_size=None)
    assert box.class_names is None
    assert next(iter(box))[1].numpy().tolist() == [0, 1, 2, 3]
    assert set(lp.load_dataset(**given, batch_size=None).class_names) == {"tags", "sort"}

    x, y = lp.load_dataset(**given, labels="sort", image_size=(3, 5), batch_size=-1)
    assert (x.shape, x.dtype, y.tolist()) == ((4, 3, 5, 1), np.uint8, [0, 1, 0, 1])
    assert [image.max() for image in x] == [0, 40, 80, 120]

    with pytest.raises(ValueError, match=r"which feature is the input.*'box', 'image'"):
        lp.load_dataset(**{**given, "inputs": None})
    with pytest.raises(ValueError, match=r"`labels` must be features.*Did you mean 'height'"):
        lp.load_dataset(**given, labels="heigt")
    with pytest.raises(ValueError, match="A label must be a class label"):
        lp.load_dataset(**{**given, "inputs": "box"}, labels="image")
    with pytest.raises(ValueError, match="`examples_per_class` needs a first label"):
        lp.load_dataset(**given, labels="height", examples_per_class=1)
    with pytest.raises(ValueError, match="`image_size` is for images"):
        lp.load_dataset(**{**given, "inputs": "box"}, labels="sort", image_size=3)


def test_examples_per_class(tfds_dir):
    def load(count, split="train", **kwargs):
        return lp.load_dataset(
            "pneumonia_mnist", split=split, examples_per_class=count, batch_size=-1,
            data_dir=tfds_dir, download=False, **kwargs,
        )  # fmt: skip

    x, y = load(20)
    assert np.bincount(y).tolist() == [20, 20]
    again, more, other = load(20), load(30), load(20, seed=1)
    np.testing.assert_array_equal(x, again[0])
    assert {image.tobytes() for image in x} <= {image.tobytes() for image in more[0]}
    assert (x != other[0]).any()
    whole = lp.load_dataset("pneumonia_mnist", split="train", batch_size=-1, data_dir=tfds_dir)
    stored = {image.tobytes(): label for image, label in zip(*whole, strict=True)}
    assert all(stored[image.tobytes()] == label for image, label in zip(x, y, strict=True))
    with pytest.raises(ValueError, match="class 0 has 135"):
        load(200, "val")
    dataset = lp.load_dataset("digits", split="train", examples_per_class=5)
    assert (len(dataset), sum(len(labels) for _, labels in dataset)) == (2, 50)


def test_splits_together_and_class_names(tfds_dir):
    both = lp.load_dataset("trec", split="train+test", data_dir=tfds_dir, batch_size=None)
    assert both.cardinality() == 5452 + 500
    assert both.class_names["label_coarse"][:2] == ["DESC", "ENTY"]
    assert len(both.class_names["label_fine"]) == 47
    digits = lp.load_dataset("digits", split="train+test", batch_size=-1)
    assert np.bincount(digits[1]).sum() == 1797
    named = lp.load_dataset("clinc_oos", split="validation", data_dir=tfds_dir)
    assert len(named.class_names["intent"]) == 150
    import tensorflow_datasets as tfds

    raw = tfds.as_numpy(tfds.load("clinc_oos", split="test", data_dir=tfds_dir))
    for example in raw:
        name = named.class_names["domain"][example["domain"]]
        assert name == example["domain_name"].decode()


def test_fit_computes_the_features_of_a_loaded_data_set_once(mlp):
    dataset = lp.load_dataset("digits", split="train")
    seen = []

    import keras

    class Look(keras.layers.Layer):
        def call(self, inputs):
            counted = tf.numpy_function(lambda x: seen.append(len(x)) or x, [inputs], inputs.dtype)
            counted.set_shape(inputs.shape)
            return counted

    layers = [keras.layers.Flatten(), Look(), keras.layers.Dense(8)]
    network = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    for data, count in ((dataset, 1437), (dataset.map(lambda x, y: (x, y)), 3 * 1437)):
        model = lp.transfer_model(network, dataset.class_names)
        seen.clear()
        model.fit(data, epochs=3, verbose=0)
        assert sum(seen) - count in (0, 1024)  # the scale is computed from 1,024 examples
