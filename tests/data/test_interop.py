"""Data of pandas, Hugging Face, Grain and the tf.data service, against the same NumPy arrays."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.federated.running import validation
from tests.conftest import Batches, with_random_heads

CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture
def trained(digits, mlp):
    """Trains a copy of one network on data, without shuffling, and returns its weights."""
    keras.utils.set_random_seed(0)
    backbone = mlp()

    def train(*data: object, **kwargs: object) -> list[np.ndarray]:
        keras.utils.set_random_seed(1)
        model = lp.transfer_model(
            keras.models.clone_model(backbone), CLASSES, pretrained=False, trainable="all"
        )
        model.fit(*data, epochs=2, shuffle=False, verbose=0, **kwargs)
        return model.get_weights()

    return train


def assert_equal(found, expected):
    tf.nest.assert_same_structure(found, expected)
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def assert_solved_alike(model, data, arrays):
    """Solves a head on both, and compares the histories."""
    found, expected = (lp.fit_head(model, one, verbose=0).history for one in (data, arrays))
    assert found == {name: pytest.approx(values, rel=1e-6) for name, values in expected.items()}


def elements(dataset):
    return [tf.nest.map_structure(np.asarray, element) for element in dataset]


class TestPandas:
    @pytest.fixture
    def frame(self, digits):
        pandas = pytest.importorskip("pandas")
        x, y = digits
        frame = pandas.DataFrame(x, columns=[f"pixel{i}" for i in range(64)])
        return frame.assign(digit=y, name=[CLASSES[i] for i in y], writer=np.arange(len(y)) % 4)

    def test_columns_train_as_arrays_do(self, frame, digits, trained):
        x, y = digits
        pixels = frame.filter(like="pixel")
        expected = trained(x, y, sample_weight=x[:, 20], validation_data=(x, y))
        assert_equal(trained(pixels, frame["digit"], sample_weight=x[:, 20]), expected)
        found = trained(
            pixels,
            frame["name"],  # class names
            sample_weight=frame["pixel20"],
            validation_data=(pixels, frame["digit"]),
        )
        assert_equal(found, expected)

    def test_columns_solve_evaluate_and_predict_as_arrays_do(self, frame, digits, mlp):
        x, y = digits
        pixels, model = frame.filter(like="pixel"), lp.transfer_model(mlp(), CLASSES)
        assert_solved_alike(model, (pixels, frame["name"]), (x, y))
        assert model.evaluate(pixels, frame["name"], verbose=0) == model.evaluate(x, y, verbose=0)
        assert_equal(model.predict(pixels, verbose=0), model.predict(x, verbose=0))

    def test_a_column_per_task_with_missing_entries(self, frame, digits, mlp):
        x, y = digits
        names = np.where(y > 6, None, np.array(CLASSES)[y])
        size = np.where(y == 3, np.nan, y / 10.0)
        frame = frame.assign(name=names, size=size)
        model = lp.multitask_model(mlp(), {"name": CLASSES, "size": lp.Regression()})
        expected = {"name": np.where(y > 6, -1, y), "size": size}
        results = [
            model.evaluate(inputs, labels, return_dict=True, verbose=0)
            for inputs, labels in (
                (x, expected),
                (frame.filter(like="pixel"), frame[["name", "size"]]),
            )
        ]
        assert results[0] == results[1]

    def test_partition_by_a_column(self, frame, digits):
        x, y = digits
        columns = frame.filter(like="pixel").assign(writer=frame["writer"])
        found = lp.partition((columns, frame["digit"]), by="writer")
        assert_equal(found, lp.partition((x, y), by=np.arange(len(y)) % 4))
        parts = lp.partition((columns, frame[["digit", "writer"]]), 3, by="writer")
        assert set(parts["client_0"][1]) == {"digit", "writer"}
        with pytest.raises(ValueError, match="Received: by='author' for a DataFrame with"):
            lp.partition((columns, frame["digit"]), by="author")
        with pytest.raises(ValueError, match="by='writer' for ndarray"):
            lp.partition((x, y), by="writer")

    def test_a_federation_validates_on_columns(self, frame, digits, mlp):
        model = with_random_heads(lp.transfer_model(mlp(), CLASSES, optimizer="sgd"))
        columns = frame.filter(like="pixel"), frame["name"]
        results = [validation(model, data, 1)(1)[0] for data in (digits, columns)]
        assert set(results[0]) == {"val_loss", "val_accuracy"}
        assert results[1] == pytest.approx(results[0])

    def test_mix(self, frame, digits):
        x, y = digits
        tasks = {"digit": lp.Classification(CLASSES), "even": 2}
        mixed = [
            lp.mix({"digit": (inputs, digit), "even": (inputs[:50], even)}, tasks=tasks, seed=3)
            for inputs, digit, even in (
                (x, y, (y % 2 == 0)[:50]),
                (frame.filter(like="pixel"), frame["name"], (frame["digit"] % 2 == 0)[:50]),
            )
        ]
        assert_equal(elements(mixed[1]), elements(mixed[0]))

    def test_columns_become_arrays_without_pandas_types(self):
        pandas = pytest.importorskip("pandas")
        from keras_lp.utils.interop import plain_inputs, plain_labels

        table = pandas.DataFrame(
            {
                "whole": pandas.array([1, None, 3], dtype="Int64"),
                "all": pandas.array([1, 2, 3], dtype="Int64"),
                "text": ["a", None, "c"],
                "class": pandas.Categorical(["no", "yes", "no"]),
            }
        )
        columns = plain_labels(table)
        np.testing.assert_array_equal(columns["whole"], [1, np.nan, 3])
        assert columns["all"].dtype == "int64"
        assert columns["text"].tolist() == ["a", "", "c"]
        assert columns["class"].tolist() == ["no", "yes", "no"]
        np.testing.assert_array_equal(plain_inputs(table[["all"]]), [[1], [2], [3]])
        assert plain_inputs({"text": table["text"]})["text"].shape == (3,)
        lists = pandas.Series([[1.0, 2.0], [3.0, 4.0]])
        np.testing.assert_array_equal(plain_inputs(lists), [[1, 2], [3, 4]])
        with pytest.raises(ValueError, match="must have different names"):
            plain_inputs(table[["all", "all"]])
        with pytest.raises(TypeError, match=r"with the columns \['text', 'class'\] that are not"):
            plain_inputs(table)


class TestGrain:
    @pytest.fixture
    def loaders(self, digits):
        """Makes a `MapDataset`, an `IterDataset` and a `DataLoader` of examples or batches."""
        grain = pytest.importorskip("grain")
        examples = list(zip(*digits, strict=True))

        def make(kind: str, batch: int | None = None) -> object:
            if kind == "DataLoader":
                sampler = grain.samplers.IndexSampler(
                    len(examples), num_epochs=1, shard_options=grain.sharding.NoSharding()
                )
                steps = [grain.transforms.Batch(batch)] if batch else []
                return grain.DataLoader(data_source=examples, sampler=sampler, operations=steps)
            dataset = grain.MapDataset.source(examples)
            dataset = dataset.batch(batch) if batch else dataset
            return dataset.to_iter_dataset() if kind == "IterDataset" else dataset

        return make

    @pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras, of unknown sizes
    @pytest.mark.parametrize("kind", ["MapDataset", "IterDataset", "DataLoader"])
    def test_loaders_train_as_tf_data_does(self, kind, loaders, digits, trained):
        batches = tf.data.Dataset.from_tensor_slices(digits).batch(30)
        if kind != "MapDataset":  # Keras counts a step more in an epoch of unknown size
            batches = batches.filter(lambda *_: True)
        expected = trained(batches)
        assert_equal(trained(loaders(kind, 30), validation_data=loaders(kind, 30)), expected)

    @pytest.mark.parametrize("kind", ["MapDataset", "IterDataset", "DataLoader"])
    def test_loaders_solve_partition_and_mix_as_arrays_do(self, kind, loaders, digits, mlp):
        x, y = digits
        model = lp.transfer_model(mlp(), CLASSES)
        assert_solved_alike(model, loaders(kind, 32), (x, y))
        assert_equal(lp.partition(loaders(kind), 3, alpha=1), lp.partition((x, y), 3, alpha=1))
        found = lp.mix({"digit": loaders(kind)}, seed=1)
        assert_equal(elements(found), elements(lp.mix({"digit": (x, y.astype("int64"))}, seed=1)))

    def test_a_loader_that_repeats_or_is_empty(self, loaders, digits, mlp):
        grain = pytest.importorskip("grain")
        model = lp.transfer_model(mlp(), CLASSES)
        endless = loaders("MapDataset", 32).repeat()
        assert len(model.fit(endless, steps_per_epoch=3, verbose=0).epoch) == 1
        examples = loaders("MapDataset")
        for one in (endless, examples.repeat().batch(32)):
            with pytest.raises(TypeError, match="Limit a data set that repeats"):
                lp.fit_head(model, one)
        with pytest.raises(TypeError, match="Received: an iterator"):
            model.fit(iter(loaders("IterDataset", 32)), verbose=0)
        with pytest.raises(ValueError, match="Received: SourceMapDataset without any"):
            model.fit(grain.MapDataset.source([]), verbose=0)


class TestHuggingFace:
    @pytest.fixture
    def images(self, digits):
        """Real digits as images of Hugging Face, and the same as arrays."""
        datasets = pytest.importorskip("datasets")
        from PIL import Image

        x, y = lp.load_dataset("digits", split="train", batch_size=-1)
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
        pictures = [Image.fromarray(image[..., 0]) for image in x[:60]]
        columns = {"image": pictures, "label": y[:60].tolist()}
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        return dataset, x[:60], y[:60]

    @pytest.fixture
    def table(self):
        datasets = pytest.importorskip("datasets")
        features = {
            "text": datasets.Value("string"),
            "topic": datasets.ClassLabel(names=["art", "sport"]),
            "tags": datasets.List(datasets.ClassLabel(names=["x", "y", "z"])),
            "score": datasets.Value("float32"),
        }
        columns = {
            "text": ["a goal", "a painting", "a match"],
            "topic": [1, 0, None],
            "tags": [[0, 2], [], [1]],
            "score": [0.5, None, 1.5],
        }
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    def test_images_come_as_the_pixels_of_the_files(self, images):
        dataset, x, y = images
        loaded = lp.load_dataset(dataset, image_size=8, batch_size=25)
        assert loaded.class_names == CLASSES
        assert [len(labels) for _, labels in loaded] == [25, 25, 10]
        assert_equal(lp.load_dataset(dataset, image_size=8, batch_size=-1), (x, y))
        _, few = lp.load_dataset(dataset, image_size=8, batch_size=-1, examples_per_class=2)
        assert np.bincount(few).tolist() == [2] * 10

    def test_training_federating_and_mixing_equal_those_on_arrays(self, images, convnet):
        dataset, x, y = images
        model = with_random_heads(lp.transfer_model(convnet(), CLASSES))
        train = lp.load_dataset(dataset, image_size=8)
        found = model.evaluate(train, verbose=0)
        assert found == model.evaluate(x, y, verbose=0)
        assert_solved_alike(model, train, (x, y))
        single = lp.load_dataset(dataset, image_size=8, batch_size=None)
        assert_equal(lp.partition(single, 4), lp.partition((x, y), 4))
        mixed = lp.mix({"digit": single})
        assert_equal(elements(mixed), elements(lp.mix({"digit": (x, y)})))

    def test_labels_of_all_kinds_and_missing_ones(self, table):
        ((text, labels),) = lp.load_dataset(table)
        assert text.numpy().tolist() == [b"a goal", b"a painting", b"a match"]
        assert labels["topic"].numpy().tolist() == [1, 0, -1]
        assert labels["tags"].numpy().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
        assert lp.load_dataset(table).class_names == {
            "topic": ["art", "sport"],
            "tags": list("xyz"),
        }
        ((_, score),) = lp.load_dataset(table, labels="score")
        np.testing.assert_array_equal(score, np.float32([0.5, np.nan, 1.5]))

    def test_absent_numbers_are_nan_whatever_their_type(self):
        datasets = pytest.importorskip("datasets")
        columns = {
            "text": ["a", "b", "c"],
            "age": [3, None, 5],
            "place": [[0.0, 1.0], None, [2.0, 3.0]],
        }
        features = {
            "text": datasets.Value("string"),
            "age": datasets.Value("int64"),
            "place": datasets.List(datasets.Value("float32"), length=2),
        }
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        given = {"inputs": "text", "labels": ["age", "place"]}
        ((_, labels),) = lp.load_dataset(table, **given)
        np.testing.assert_array_equal(labels["age"], np.float32([3, np.nan, 5]))
        assert np.isnan(labels["place"][1]).all()

    def test_files_and_saved_data_sets_load_by_name(self, table, tmp_path):
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        (tmp_path / "files").mkdir()
        table.to_parquet(tmp_path / "files" / "train.parquet")
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
        expected = elements(lp.load_dataset(table, batch_size=None))
        files = lp.load_dataset(
            f"hf:{tmp_path}/files", split="train[:2]", data_dir=tmp_path / "cache", batch_size=None
        )
        assert files.split == "train[:2]"
        assert_equal(elements(files), expected[:2])
        saved = lp.load_dataset(f"hf:{tmp_path}/saved", split="train+test", batch_size=None)
        assert_equal(elements(saved), [*expected, *expected])

    def test_an_absent_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'keras_lp\[interop\]'"):
            lp.load_dataset("hf:owner/name", split="train")

    def test_errors(self, table, mlp):
        datasets = pytest.importorskip("datasets")
        splits = datasets.DatasetDict({"train": table})
        model = lp.transfer_model(mlp(), CLASSES)
        with pytest.raises(TypeError, match=r"Pass `lp.load_dataset\(dataset\)`"):
            model.fit(table)
        with pytest.raises(ValueError, match=r"Received: split='tran'\. Did you mean 'train'"):
            lp.load_dataset(splits, split="tran")
        with pytest.raises(ValueError, match="Received: split='test' for a Dataset"):
            lp.load_dataset(table, split="test")
        with pytest.raises(ValueError, match=r"topic \(ClassLabel\).*Received: labels='topc'"):
            lp.load_dataset(table, labels="topc")
        with pytest.raises(ValueError, match="`split` must be given"):
            lp.load_dataset("hf:owner/name")
        with pytest.raises(TypeError, match="without `streaming`"):
            lp.load_dataset(table.to_iterable_dataset(), split="train")
        with pytest.raises(ValueError, match="a first label that is one class"):
            lp.load_dataset(table, labels="score", examples_per_class=1)


def test_a_users_own_module_may_have_any_name(digits, mlp):
    own = type("Batches", (Batches,), {"__module__": "datasets"})
    model = lp.transfer_model(mlp(), CLASSES)
    assert model.fit(own(*digits), verbose=0).epoch == [0]


class TestDataService:
    def test_a_distributed_data_set_trains_solves_and_mixes(self, digits, trained, mlp):
        x, y = digits
        service = tf.data.experimental.service
        dispatcher = service.DispatchServer(service.DispatcherConfig(port=0))
        address = dispatcher.target.split("://")[1]
        worker = service.WorkerServer(service.WorkerConfig(dispatcher_address=address))

        def distributed(dataset: tf.data.Dataset) -> tf.data.Dataset:
            distribute = service.distribute("parallel_epochs", dispatcher.target)
            count = dataset.cardinality()
            return dataset.apply(distribute).apply(tf.data.experimental.assert_cardinality(count))

        examples = tf.data.Dataset.from_tensor_slices((x, y))
        assert_equal(trained(distributed(examples.batch(32))), trained(x, y))
        model = lp.transfer_model(mlp(), CLASSES)
        assert_solved_alike(model, distributed(examples.batch(32)), (x, y))
        assert_equal(lp.partition(distributed(examples), 3), lp.partition((x, y), 3))
        mixed = lp.mix({"digit": distributed(examples)})
        assert_equal(elements(mixed), elements(lp.mix({"digit": (x, y)})))
        worker._stop()
        dispatcher._stop()
