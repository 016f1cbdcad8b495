import sys

import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp import datasets


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
        with pytest.raises(ValueError, match="class labels"):
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
