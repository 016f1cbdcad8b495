"""Several data sets in one stream: counts, order, missing labels."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_lp as lp
from keras_lp.multitask.mixing import epoch_counts

INF = float("inf")


def numbered(start, size):
    """Examples whose input is their own number and whose label is its last digit."""
    x = np.arange(start, start + size)
    return x[:, None].astype("float32"), (x % 10).astype("int32")


def mixed(*sizes, **arguments):
    """Data sets "a", "b", "c" of these sizes, numbered from 0, 100, ..."""
    data = {"abc"[i]: numbered(100 * i, size) for i, size in enumerate(sizes)}
    return lp.mix(data, **{"batch_size": 7, **arguments})


def epoch(dataset):
    """Inputs and labels of one epoch as arrays."""
    batches = list(dataset.as_numpy_iterator())
    x = np.concatenate([x for x, _ in batches])
    return x, {name: np.concatenate([y[name] for _, y in batches]) for name in batches[0][1]}


def order(dataset):
    return epoch(dataset)[0][:, 0].astype(int).tolist()


def test_by_default_every_example_is_seen_once_an_epoch():
    dataset = mixed(30, 7, 1)
    for _ in range(3):
        assert sorted(order(dataset)) == [*range(30), *range(100, 107), 200]


def test_labels_stay_with_their_inputs_and_those_of_other_tasks_are_missing():
    x, labels = epoch(mixed(20, 9))
    number = x[:, 0].astype(int)
    assert set(labels) == {"a", "b"}
    np.testing.assert_array_equal(labels["a"], np.where(number < 100, number % 10, -1))
    np.testing.assert_array_equal(labels["b"], np.where(number >= 100, number % 10, -1))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [64, 16, 4]),
        ({"temperature": 2.0}, [48, 24, 12]),  # the roots are 8, 4 and 2
        ({"temperature": INF}, [28, 28, 28]),
        ({"cap": 16}, [16, 16, 4]),
        ({"cap": 16, "temperature": 2}, [15, 14, 7]),  # 36 as 4, 4 and 2: 14.4, 14.4 and 7.2
        ({"cap": 1000}, [64, 16, 4]),
    ],
)
def test_shares_are_those_worked_out_by_hand(arguments, expected):
    dataset = mixed(64, 16, 4, **arguments)
    for _ in range(2):
        assert np.bincount(np.array(order(dataset)) // 100).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    temperature=st.one_of(st.floats(1, 100), st.just(INF)),
    cap=st.one_of(st.none(), st.integers(100, 10**6)),
)
def test_shares_add_up_and_are_within_one_of_the_exact_ones(sizes, temperature, cap):
    capped = [min(size, cap or size) for size in sizes]
    weights = np.exp(np.log(capped) / temperature)
    exact = sum(capped) * weights / weights.sum()
    shares = epoch_counts(dict(enumerate(sizes)), temperature, cap)
    assert sum(shares.values()) == sum(capped)
    assert np.abs(np.array(list(shares.values())) - exact).max() < 1 + 1e-6
    if temperature == 1:
        assert list(shares.values()) == capped


def test_the_stream_knows_its_length_and_keeps_the_last_batch():
    dataset = mixed(30, 7, batch_size=8)
    assert dataset.cardinality() == 5
    assert [len(x) for x, _ in dataset] == [8, 8, 8, 8, 5]


def test_a_small_data_set_is_gone_through_whole_before_any_example_comes_again():
    dataset = mixed(40, 6, temperature=INF)  # 23 of each: three passes of 6, and 5
    small = [[n for n in order(dataset) if n >= 100] for _ in range(2)]
    for numbers in small:
        passes = [numbers[i : i + 6] for i in (0, 6, 12)]
        assert all(sorted(one) == [*range(100, 106)] for one in passes)
        assert len({tuple(one) for one in passes}) > 1
        assert len(set(numbers[18:])) == len(numbers[18:]) == 5


def test_a_large_data_set_gives_other_examples_in_each_epoch():
    dataset = mixed(90, 10, temperature=INF)  # 50 of each
    chosen = [{n for n in order(dataset) if n < 100} for _ in range(8)]
    assert all(len(numbers) == 50 for numbers in chosen)
    assert len(set.union(*chosen)) > 85  # 90 - 90 * (40 / 90) ** 8 = 89.9 are expected
    assert chosen[0] != chosen[1]


def test_data_sets_alternate_at_random():
    dataset = mixed(50, 50, batch_size=100)
    places = [np.flatnonzero(np.array(order(dataset)) >= 100).mean() for _ in range(40)]
    assert 1.5 < np.std(places) < 5  # the mean place of 50 random ones of 100 varies by 2.9
    assert abs(np.mean(places) - 49.5) < 2


def test_a_seed_gives_one_sequence_of_epochs_whatever_the_global_seed():
    sequences = []
    for global_seed in (1, 2):
        keras.utils.set_random_seed(global_seed)
        dataset = mixed(30, 8, temperature=3.0, seed=5)
        sequences.append([order(dataset) for _ in range(3)])
    assert sequences[0] == sequences[1]
    assert len({tuple(numbers) for numbers in sequences[0]}) == 3
    assert order(mixed(30, 8, temperature=3.0, seed=6)) != sequences[0][0]


def test_mixing_leaves_the_global_seed_alone():
    tf.random.set_seed(3)
    expected = float(tf.random.uniform([]))
    tf.random.set_seed(3)
    mixed(5, 5)
    assert float(tf.random.uniform([])) == expected


@pytest.mark.parametrize(
    ("given_dtype", "dtype", "missing"),
    [
        ("bool", "int32", -1),
        ("uint8", "int32", -1),
        ("int32", "int32", -1),
        ("uint32", "int64", -1),
        ("int64", "int64", -1),
        ("float32", "float32", np.nan),
        ("float64", "float64", np.nan),
    ],
)
def test_the_missing_label_follows_the_dtype(given_dtype, dtype, missing):
    data = {
        "a": (np.zeros(2), np.ones((2, 3), given_dtype)),
        "b": (np.ones(2), np.zeros(2, "int32")),
    }
    dataset = lp.mix(data)
    x, labels = epoch(dataset)
    assert dataset.element_spec[1]["a"] == tf.TensorSpec((None, 3), dtype)
    np.testing.assert_array_equal(labels["a"], np.where(x[:, None] == 0, [[1] * 3], missing))


@pytest.mark.parametrize(
    ("task", "given_dtype", "dtype", "missing"),
    [
        (lp.Regression(2), "int64", "float32", np.nan),
        (lp.Regression(2), "float64", "float32", np.nan),
        (lp.MultiLabel(2), "float32", "float32", -1),
        (lp.MultiLabel(["p", "q"]), "uint8", "int32", -1),
        (2, "float32", "float32", -1),
        (["no", "yes"], "int64", "int64", -1),
    ],
)
def test_tasks_say_what_a_missing_label_is(task, given_dtype, dtype, missing):
    data = {
        "a": (np.zeros(2), np.ones((2, 2), given_dtype)),
        "b": (np.ones(2), np.zeros(2, "int32")),
    }
    dataset = lp.mix(data, tasks={"a": task})
    x, labels = epoch(dataset)
    assert dataset.element_spec[1]["a"] == tf.TensorSpec((None, 2), dtype)
    np.testing.assert_array_equal(labels["a"], np.where(x[:, None] == 0, [[1] * 2], missing))


def test_a_data_set_of_several_tasks_has_a_dict_of_labels():
    data = {
        "intents": (np.zeros(3), {"domain": np.array([1, 2, 3]), "intent": np.array([4, 5, 6])}),
        "more": (np.ones(2), {"domain": np.array([7, -1], "int8")}),
        "sentiment": (np.full(1, 2.0), np.array([1])),
    }
    x, labels = epoch(lp.mix(data))
    assert set(labels) == {"domain", "intent", "sentiment"}
    rows = np.column_stack([x, labels["domain"], labels["intent"], labels["sentiment"]])
    expected = [[0, 1, 4, -1], [0, 2, 5, -1], [0, 3, 6, -1], [1, -1, -1, -1], [1, 7, -1, -1],
                [2, -1, -1, 1]]  # fmt: skip
    assert sorted(rows.tolist()) == expected


def test_inputs_may_be_a_dict_and_texts():
    texts = {"text": np.array(["x", "y"]), "length": np.array([1, 2])}
    data = {"a": (texts, np.array([0, 1])), "b": (texts, np.array([1, 0]))}
    x, labels = next(iter(lp.mix(data, batch_size=4)))
    assert sorted(x["text"].numpy().tolist()) == [b"x", b"x", b"y", b"y"]
    text, length = x["text"].numpy(), x["length"].numpy()
    np.testing.assert_array_equal(length, np.where(text == b"x", 1, 2))
    seen = labels["a"].numpy() >= 0
    np.testing.assert_array_equal(labels["a"][seen], np.where(text == b"x", 0, 1)[seen])
    np.testing.assert_array_equal(labels["b"][~seen], np.where(text == b"x", 1, 0)[~seen])


def test_shapes_that_are_open_in_one_data_set_only_can_be_mixed():
    known = tf.data.Dataset.from_tensor_slices(numbered(0, 3))
    opened = known.map(lambda x, y: (tf.ensure_shape(tf.py_function(lambda a: a, [x], x.dtype),
                                                     [None]), y))  # fmt: skip
    assert sorted(order(lp.mix({"a": known, "b": opened}))) == [0, 0, 1, 1, 2, 2]


def test_labels_that_a_data_set_itself_lacks_stay_missing():
    data = {"a": (np.zeros(3), np.array([1.0, np.nan, 2.0])), "b": (np.ones(1), np.array([0]))}
    _, labels = epoch(lp.mix(data))
    assert sorted(labels["a"].tolist(), key=str) == pytest.approx([1.0, 2.0, np.nan, np.nan],
                                                                  nan_ok=True)  # fmt: skip


def test_a_mixed_stream_trains_as_masked_arrays_do(mlp):
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(n, 64)).astype("float32") for name, n in (("a", 12), ("b", 5))}
    y = {"a": rng.integers(0, 4, 12), "b": rng.normal(size=5).astype("float32")}
    tasks = {"a": 4, "b": lp.Regression()}
    model = lp.multitask_model(mlp(), tasks, optimizer=keras.optimizers.SGD(0.1))
    start = model.get_weights()
    dataset = lp.mix({name: (x[name], y[name]) for name in x}, batch_size=17)
    ours, trained = model.fit(dataset, verbose=0).history, model.get_weights()

    model.set_weights(start)
    masked = {
        "a": np.concatenate([y["a"], np.full(5, -1)]),
        "b": np.concatenate([np.full(12, np.nan), y["b"]]),
    }
    theirs = model.fit(np.concatenate([x["a"], x["b"]]), masked, batch_size=17, verbose=0).history
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5)
    for mine, other in zip(trained, model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


def test_a_task_absent_from_a_batch_moves_nothing_of_its_own(mlp):
    data = {
        "a": (np.ones((4, 64), "float32"), np.zeros(4, int)),
        "b": (np.ones((1, 64), "float32"), np.zeros(1, int)),
    }
    model = lp.multitask_model(mlp(), {"a": 3, "b": 3}, optimizer=keras.optimizers.SGD(0.1))
    for x, labels in lp.mix(data, batch_size=1):
        absent = "b" if labels["a"][0] >= 0 else "a"
        before = [weight.numpy() for weight in model.get_layer(absent).weights]
        model.train_on_batch(x, labels)
        after = [weight.numpy() for weight in model.get_layer(absent).weights]
        np.testing.assert_array_equal(np.concatenate(before, None), np.concatenate(after, None))


# Errors

SINGLE = tf.data.Dataset.from_tensor_slices((np.zeros((6, 2)), np.zeros(6, int)))


@pytest.mark.parametrize(
    ("datasets", "error", "message"),
    [
        ([SINGLE], TypeError, "dict of data sets by task"),
        ({3: SINGLE}, TypeError, "dict of data sets by task"),
        ({}, ValueError, "at least one data set"),
        ({"a": np.zeros(3)}, TypeError, r"datasets\['a'\] of type ndarray"),
        ({"a": (np.zeros(3), np.zeros(2))}, ValueError, "as many labels as inputs"),
        ({"a": (np.zeros(0), np.zeros(0))}, ValueError, "at least one example"),
        ({"a": SINGLE.map(lambda x, y: x)}, ValueError, "must yield pairs"),
        ({"a": SINGLE.map(lambda x, y: (x, y, y))}, ValueError, "must yield pairs"),
        ({"a": SINGLE.batch(2)}, ValueError, r"dataset\.unbatch\(\)"),
        ({"a": SINGLE.repeat()}, ValueError, r"'a'.*Remove `repeat\(\)`"),
        ({"a": SINGLE.filter(lambda x, y: y > 0)}, ValueError, r"assert_cardinality\(n\)"),
        ({"a": (np.zeros(2), np.array(["p", "q"]))}, TypeError, "Labels must be numbers"),
        ({"a": SINGLE.map(lambda x, y: (x, (y, y)))}, TypeError, "dict of tensors by task"),
    ],
)
def test_data_that_cannot_be_mixed_are_refused(datasets, error, message):
    with pytest.raises(error, match=message):
        lp.mix(datasets)


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (np.zeros((2, 3)), r"shape=\(3,\), dtype=tf.float64"),
        (np.zeros((2, 2), "float32"), r"shape=\(2,\), dtype=tf.float32"),
        ({"x": np.zeros((2, 2))}, r"\{'x'"),
    ],
)
def test_inputs_that_differ_are_shown_side_by_side(other, shown):
    own = r"'a'\] with x of TensorSpec\(shape=\(2,\), dtype=tf.float64"
    with pytest.raises(ValueError, match=rf"same structure.*{own}.*'b'\] with x of .*{shown}"):
        lp.mix({"a": SINGLE, "b": (other, np.zeros(2, int))})


@pytest.mark.parametrize("labels", [np.zeros((2, 1), int), np.zeros(2)])
def test_labels_of_one_task_must_be_of_one_kind(labels):
    other = (np.zeros((2, 2)), {"a": labels})
    with pytest.raises(ValueError, match=r"Labels of one task.*'a'.*'a': Tensor.*'more': Tensor"):
        lp.mix({"a": SINGLE, "more": other})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size`.*batch_size=0"),
        ({"batch_size": 2.5}, ValueError, "`batch_size`"),
        ({"temperature": 0}, ValueError, "`temperature`.*temperature=0"),
        ({"temperature": float("nan")}, ValueError, "`temperature`"),
        ({"cap": 0}, ValueError, "`cap`.*cap=0"),
        ({"cap": INF}, ValueError, "`cap`"),
        ({"tasks": {"setiment": 2}}, ValueError, "'setiment'. Did you mean 'sentiment'"),
        ({"tasks": {"sentiment": None}}, TypeError, "lp.Classification"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        lp.mix({"sentiment": SINGLE}, **arguments)


def test_a_data_set_without_a_share_is_refused():
    # 64, 16 and 4 squared: 84 shared out as 78.8, 4.9 and 0.3
    with pytest.raises(ValueError, match=r"share in an epoch.*'c': 0.*Raise `temperature`"):
        mixed(64, 16, 4, temperature=0.5)
