"""Partitions of a data set into clients."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_lp as lp


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 200),
    share=st.floats(0, 1),
    classes=st.integers(1, 10),
    alpha=st.none() | st.floats(0.01, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_are_disjoint_covering_and_not_empty(examples, share, classes, alpha, seed):
    clients = max(1, int(share * examples))
    labels = np.random.default_rng(0).integers(classes, size=examples)
    x = np.arange(examples)
    parts = lp.partition((x, labels), clients, alpha=alpha, seed=seed)
    assert len(parts) == clients
    assert sorted(np.concatenate([part for part, _ in parts.values()])) == list(range(examples))
    for part, its_labels in parts.values():
        assert len(part) > 0
        np.testing.assert_array_equal(its_labels, labels[part])


def test_equal_parts_differ_by_one_example_at_most():
    sizes = {len(y) for _, y in lp.partition((np.arange(103), np.zeros(103)), 10).values()}
    assert sizes == {10, 11}


def test_a_small_alpha_skews_the_labels_and_a_large_one_does_not():
    y = np.repeat(np.arange(10), 100)

    def share_of_commonest(alpha):
        parts = lp.partition((np.arange(1000), y), 10, alpha=alpha).values()
        return np.mean([np.bincount(labels).max() / len(labels) for _, labels in parts])

    assert share_of_commonest(0.05) > 0.5
    assert share_of_commonest(1000.0) < 0.2


def test_partition_is_seeded_and_takes_dicts_and_datasets(digits):
    a, b, c = (lp.partition(digits, 7, alpha=0.5, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a[name][1], b[name][1]) for name in a)
    assert any(not np.array_equal(a[name][1], c[name][1]) for name in a)
    x, y = digits
    parts = lp.partition((x, {"digit": y, "odd": y % 2}), 3)
    for _, labels in parts.values():
        np.testing.assert_array_equal(labels["odd"], labels["digit"] % 2)
    dataset = tf.data.Dataset.from_tensor_slices(digits)
    for name, part in lp.partition(dataset, 7, alpha=0.5).items():
        np.testing.assert_array_equal(part[1], a[name][1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 201}, "clients=201 for 200 examples"),
        ({"clients": 0}, "clients=0"),
        ({"clients": 2, "alpha": 0.0}, "alpha=0.0"),
        ({"clients": 2, "alpha": 1.0, "shards": 2}, "Received: alpha and shards"),
        ({"clients": 101, "shards": 2}, "clients=101 with shards=2 for 200"),
        ({"clients": 2, "by": [1, 2]}, r"shape \(2,\)"),
        ({"clients": 3, "by": [0, 1] * 100}, "clients=3 for 2 different keys"),
        ({}, "clients=None"),
    ],
)
def test_wrong_partitions_are_refused(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.partition(digits, **arguments)


def test_partition_refuses_labels_of_another_length_and_batches(digits):
    x, y = digits
    with pytest.raises(ValueError, match=r"lengths \[100, 200\]"):
        lp.partition((x[:100], y), 3)
    with pytest.raises(ValueError, match="unbatch"):
        lp.partition(tf.data.Dataset.from_tensor_slices(digits).batch(15), 3)


def test_alpha_and_shards_need_classes(digits):
    x, y = digits
    for labels in (y.astype("float32"), {"digit": y}, 2 * np.eye(10)[y]):
        for way in ("alpha", "shards"):
            with pytest.raises(ValueError, match=f"`{way}` requires.*one class per example"):
                lp.partition((x, labels), 3, **{way: 1})


@pytest.mark.parametrize("way", ["alpha", "shards"])
def test_every_form_of_labels_gives_the_same_clients(digits, way):
    x, y = digits
    names = np.array(list("abcdefghij"))[y]
    expected = lp.partition((x, y), 4, **{way: 2})
    for labels in (y[:, None], np.eye(10)[y], 0.7 * np.eye(10)[y] + 0.03, names):
        for client, (rows, own) in lp.partition((x, labels), 4, **{way: 2}).items():
            np.testing.assert_array_equal(rows, expected[client][0])
            assert own.shape[1:] == labels.shape[1:]
    described = lp.describe_clients(lp.partition((x, np.eye(10)[y]), 4, **{way: 2}), verbose=False)
    again = lp.describe_clients(expected, verbose=False)
    np.testing.assert_array_equal(described.counts["label"], again.counts["label"])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 50), st.integers(0, 9))
def test_shards_are_disjoint_covering_and_of_few_classes(clients, shards, more, seed):
    examples = clients * shards * 3 + more
    labels = np.random.default_rng(seed).integers(4, size=examples)
    parts = lp.partition((np.arange(examples), labels), clients, shards=shards, seed=seed)
    assert len(parts) == clients
    assert sorted(np.concatenate([x for x, _ in parts.values()])) == list(range(examples))
    # A shard cuts at most from one class into the next ones that fit in it.
    borders = sum(len(np.unique(y)) for _, y in parts.values())
    assert borders <= clients * shards + 3


def test_two_shards_of_pure_classes_give_two_classes_at_most():
    """McMahan's: 100 examples of 10 classes, 5 clients of two shards of 10."""
    y = np.repeat(np.arange(10), 10)
    parts = lp.partition((np.arange(100), y), 5, shards=2)
    assert [len(y) for _, y in parts.values()] == [20] * 5
    assert all(len(np.unique(y)) <= 2 for _, y in parts.values())


def test_a_natural_key_makes_each_key_a_client_or_keeps_it_whole():
    keys = np.array(["b", "a", "b", "c", "b", "d"])
    data = (np.arange(6), np.zeros(6), np.ones(6))
    alone = lp.partition(data, by=keys)
    assert {name: list(part[0]) for name, part in alone.items()} == {
        "a": [1], "b": [0, 2, 4], "c": [3], "d": [5],
    }  # fmt: skip
    assert all(len(part) == 3 for part in alone.values())
    two = [set(keys[x]) for x, *_ in lp.partition(data, 2, by=keys).values()]
    assert two == [{"b"}, {"a", "c", "d"}]  # three examples each


def test_describe_clients_counts_labels_present(capsys, tmp_path):
    y = {"digit": np.array([0, 2, -1, 2]), "value": np.zeros(4, "float32")}
    clients = {"a": (np.zeros(4), y), "b": (np.zeros(2), {"value": np.zeros(2, "float32")})}
    labels = lp.describe_clients(clients)
    assert labels.examples == {"a": 4, "b": 2}
    np.testing.assert_array_equal(labels.counts["digit"], [[1, 2], [0, 0]])
    np.testing.assert_array_equal(labels.classes["digit"], [0, 2])
    assert set(labels.counts) == {"digit"}
    assert "2 clients, 6 examples" in capsys.readouterr().out
    figure = labels.plot(tmp_path / "labels.png")
    assert (tmp_path / "labels.png").stat().st_size > 1000
    assert len(figure.axes[0].patches) == 4  # two classes of two clients
    assert ticks(figure.axes[0].xaxis) == ["a", "b"]
    assert legend(figure.axes[0]) == ["2", "0"]
    assert heights(figure.axes[0]) == [1, 0, 2, 0]
    assert lp.describe_clients({"a": (np.zeros(3), np.zeros(3))}, verbose=False).counts == {}


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def heights(axes):
    return [patch.get_height() for patch in axes.patches]


def plotted(clients):
    figure = lp.describe_clients(clients, verbose=False).plot()
    figure.draw_without_rendering()
    return figure


def test_the_plot_of_named_classes():
    names = np.array(["sushi", "cheese", "a name of more than twenty letters"])
    clients = {
        name: (np.zeros(3), names[[0, 0, i]]) for i, name in enumerate(["ada", "bob", "eve"])
    }
    (axes,) = plotted(clients).axes
    assert ticks(axes.xaxis) == ["ada", "bob", "eve"]
    assert legend(axes) == ["sushi", "cheese", "a name of more than…"]  # the top first
    assert axes.get_legend().get_title().get_text() == "class"
    assert heights(axes) == [0, 0, 1, 0, 1, 0, 3, 2, 2]
    assert all(value == int(value) for value in axes.get_yticks())
    assert len({patch.get_facecolor() for patch in axes.patches}) == 3


def test_the_plot_of_many_classes_and_clients_is_a_heat_map():
    x, y = np.zeros(6200), np.tile(np.arange(62), 100)
    clients = lp.partition((x, y), clients=200, alpha=0.3)
    figure = plotted(clients)
    axes, bar = figure.axes
    (image,) = axes.images
    for i, (_, labels) in enumerate(clients.values()):
        np.testing.assert_array_equal(
            image.get_array()[:, i].filled(0), np.bincount(labels, minlength=62)
        )
    assert image.get_array()[0].mask.any()  # none is no colour
    assert image.cmap.name == "viridis_r"
    assert ticks(axes.xaxis) == [f"client_{i:03d}" for i in range(0, 200, 5)]
    assert ticks(axes.yaxis) == [str(i) for i in range(0, 62, 3)]
    assert axes.get_xlabel() == "client (one name in 5)"
    assert bar.get_ylabel() == "labels (white: none)"
    size = figure.get_window_extent()
    for text in (*axes.get_xticklabels(), axes.xaxis.label, bar.yaxis.label):  # not cut off
        box = text.get_window_extent()
        assert size.x0 <= box.x0 <= box.x1 <= size.x1
        assert size.y0 <= box.y0 <= box.y1 <= size.y1


def test_the_plot_of_several_tasks_and_of_values():
    y = {"topic": np.arange(12), "even": np.arange(12) % 2, "size": np.zeros(12)}
    figure = plotted({"a": (np.zeros(12), y), "b": (np.zeros(12), y)})
    even, topic, _ = figure.axes
    assert [axes.get_title() for axes in (even, topic)] == ["even", "topic"]
    assert even.get_xlabel() == ""  # the clients are named once
    assert ticks(topic.xaxis) == ["a", "b"]
    (axes,) = plotted({3: (np.zeros(2), np.zeros(2)), 4: (np.zeros(1), np.zeros(1))}).axes
    assert heights(axes) == [2, 1]
    assert ticks(axes.xaxis) == ["3", "4"]
    assert axes.get_ylabel() == "examples"
    assert axes.get_legend() is None
