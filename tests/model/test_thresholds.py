"""`choose_thresholds` against brute force with scikit-learn, and where its thresholds go."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import keras_lp as lp
from keras_lp.model.thresholds import best_threshold, set_thresholds
from keras_lp.tasks.heads import heads, tasks
from keras_lp.tasks.metrics import MacroF1
from tests.conftest import Batches, assert_same, snapshot, with_random_heads

sklearn = pytest.importorskip("sklearn.metrics")

LABELS = 5


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, "float64")))


def data(n=200, missing=0.2, seed=0):
    """Labels from frequent to rare, the last never there; entries of -1 are missing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 64)).astype("float32")
    y = (x[:, :LABELS] + rng.normal(size=(n, LABELS)) > [0, 1, 1.5, 2, 99]).astype("int32")
    return x, np.where(rng.uniform(size=y.shape) < missing, -1, y)


def built(mlp, task=LABELS, **arguments):
    task = lp.MultiLabel(task) if isinstance(task, int) else task
    return with_random_heads(lp.transfer_model(mlp(), task, **arguments))


def f1_of(y, chosen, weight=None):
    """scikit-learn's F1 of each label over the entries present, None without a positive."""
    weight = np.ones(y.shape) if weight is None else np.broadcast_to(weight, y.shape)
    scores = []
    for i in range(y.shape[1]):
        here = (y[:, i] >= 0) & (weight[:, i] > 0)
        own = y[here, i]
        scores.append(
            sklearn.f1_score(own, chosen[here, i], sample_weight=weight[here, i])
            if own.any()
            else None
        )
    return scores


def macro(scores):
    return np.mean([score for score in scores if score is not None])


def brute_force(p, y, weight):
    """The largest F1 over a threshold below, between and above all probabilities."""
    values = np.unique(p)
    cuts = [0, *(values[1:] + values[:-1]) / 2, 1]
    scores = [sklearn.f1_score(y, p > t, sample_weight=weight, zero_division=0) for t in cuts]
    return max(scores)


# One label, against brute force

EXAMPLES = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        hnp.arrays("int64", n, elements=st.integers(1, 12)),  # few values: many are equal
        hnp.arrays("int64", n, elements=st.integers(0, 1)),
        hnp.arrays("int64", n, elements=st.integers(0, 3)),
    )
)


@settings(deadline=None, max_examples=200)
@given(EXAMPLES)
def test_no_threshold_has_a_larger_f1(drawn):
    steps, y, weight = drawn
    p = steps / 13
    threshold = best_threshold(p, weight * y, weight * (1 - y))
    assert 0 < threshold < 1
    present = weight > 0
    if not (y * weight).any():
        assert threshold == 0.5
        return
    p, y, weight = p[present], y[present], weight[present]
    reached = sklearn.f1_score(y, p > threshold, sample_weight=weight)
    assert reached == pytest.approx(brute_force(p, y, weight), abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(EXAMPLES)
def test_a_threshold_is_midway_and_the_best_one_nearest_to_a_half(drawn):
    steps, y, weight = drawn
    present = weight > 0
    p = steps / 13
    threshold = best_threshold(p, weight * y, weight * (1 - y))
    if not (y * weight).any():
        return
    p, y, weight = p[present], y[present], weight[present]
    values = np.array([0, *np.unique(p)])
    midway = (values[1:] + values[:-1]) / 2
    assert np.isclose(midway, threshold, rtol=0, atol=1e-15).any()
    scores = np.array([sklearn.f1_score(y, p > t, sample_weight=weight) for t in midway])
    equal = midway[np.isclose(scores, scores.max(), rtol=0, atol=1e-12)]
    assert abs(threshold - 0.5) == pytest.approx(np.abs(equal - 0.5).min(), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(EXAMPLES, st.randoms(use_true_random=False))
def test_the_order_and_the_scale_of_weights_do_not_matter(drawn, random):
    steps, y, weight = drawn
    order = list(range(len(y)))
    random.shuffle(order)
    p = steps / 13
    one = best_threshold(p, weight * y, weight * (1 - y))
    other = best_threshold(p[order], (4.0 * weight * y)[order], (4.0 * weight * (1 - y))[order])
    assert one == other


def test_numbers_worked_out_by_hand():
    p = np.array([0.1, 0.2, 0.4, 0.6, 0.9])
    y = np.array([0, 1, 0, 1, 1])
    # Above 0.15: TP 3, FP 1, F1 6/7. Above 0.5: TP 2, FN 1, F1 4/5.
    assert best_threshold(p, y, 1 - y) == pytest.approx(0.15)
    # The positive at 0.2 counts a tenth: above 0.5 F1 is 4/4.1, above 0.15 4.2/5.2.
    weight = np.array([1, 0.1, 1, 1, 1])
    assert best_threshold(p, weight * y, weight * (1 - y)) == pytest.approx(0.5)
    # All positive: any threshold below the lowest; half of it.
    assert best_threshold(p, np.ones(5), np.zeros(5)) == pytest.approx(0.05)
    assert best_threshold(p, np.zeros(5), np.ones(5)) == 0.5


def test_probabilities_of_exactly_0_and_1_give_thresholds_between():
    p, y = np.array([0.0, 0.0, 1.0]), np.array([1.0, 0, 0])
    assert best_threshold(p, y, 1 - y) == 0.5  # nothing finds the positive
    assert best_threshold(p[::-1], y, 1 - y) == 0.5


# A model


def test_each_label_has_the_largest_f1_of_all_thresholds(mlp):
    x, y = data()
    model = built(mlp)
    thresholds = lp.choose_thresholds(model, (x, y))
    p = sigmoid(model.predict(x, verbose=0))
    assert thresholds.shape == (LABELS,)
    assert thresholds[-1] == 0.5  # never positive
    scores = f1_of(y, p > thresholds)
    for i in range(LABELS - 1):
        here = y[:, i] >= 0
        assert scores[i] == pytest.approx(brute_force(p[here, i], y[here, i], None), abs=1e-12)
    assert macro(scores) > macro(f1_of(y, p > 0.5))


def test_sample_weights_are_respected(mlp):
    x, y = data()
    weight = np.random.default_rng(1).integers(0, 4, len(y)).astype("float32")
    model = built(mlp)
    thresholds = lp.choose_thresholds(model, (x, y, weight))
    p = sigmoid(model.predict(x, verbose=0))
    scores = f1_of(y, p > thresholds, weight[:, None])
    for i in range(LABELS - 1):
        here = (y[:, i] >= 0) & (weight > 0)
        best = brute_force(p[here, i], y[here, i], weight[here])
        assert scores[i] == pytest.approx(best, abs=1e-12)
    logs = model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
    assert logs["f1"] == pytest.approx(macro(scores), abs=1e-6)


def test_evaluate_uses_them_at_once_after_it_was_traced_without(mlp):
    x, y = data()
    model = built(mlp)
    logits = model.predict(x, verbose=0)
    before = model.evaluate(x, y, verbose=0, return_dict=True)
    assert before["f1"] == pytest.approx(macro(f1_of(y, logits > 0)), abs=1e-6)
    thresholds = lp.choose_thresholds(model, (x, y))
    after = model.evaluate(x, y, verbose=0, return_dict=True)
    assert after["f1"] == pytest.approx(macro(f1_of(y, sigmoid(logits) > thresholds)), abs=1e-6)
    assert after["f1"] > before["f1"] + 0.01
    assert after["loss"] == before["loss"]
    assert after["map"] == before["map"]
    other = np.full(LABELS, 0.3)
    set_thresholds(model, {"predictions": other})
    again = model.evaluate(x, y, verbose=0, return_dict=True)
    assert again["f1"] == pytest.approx(macro(f1_of(y, sigmoid(logits) > other)), abs=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_fit_goes_on_as_if_nothing_had_been_chosen_but_for_f1(mlp, cached):
    x, y = data()
    histories, weights = [], []
    for chosen in (False, True):
        keras.utils.set_random_seed(0)
        model = built(mlp, cache_features="auto" if cached else False)
        fit = {"epochs": 2, "verbose": 0, "shuffle": False, "validation_data": (x, y)}
        model.fit(x, y, **fit)
        optimizer, steps = model.optimizer, int(model.optimizer.iterations)
        if chosen:
            thresholds = lp.choose_thresholds(model, (x, y))
            assert model.optimizer is optimizer
            assert int(model.optimizer.iterations) == steps > 0
        histories.append(model.fit(x, y, **fit).history)
        weights.append(snapshot(model))
    assert_same(*weights)
    assert histories[0]["loss"] == histories[1]["loss"]
    assert histories[0]["val_map"] == histories[1]["val_map"]
    expected = macro(f1_of(y, sigmoid(model.predict(x, verbose=0)) > thresholds))
    assert histories[1]["val_f1"][-1] == pytest.approx(expected, abs=1e-6)
    assert histories[1]["val_f1"] != histories[0]["val_f1"]


def test_a_callback_may_choose_while_fit_runs(mlp):
    x, y = data()
    model = built(mlp)

    class Choose(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            lp.choose_thresholds(self.model, (x, y))

    history = model.fit(x, y, epochs=3, verbose=0, validation_data=(x, y), callbacks=[Choose()])
    assert len(history.history["val_f1"]) == 3
    p = sigmoid(model.predict(x, verbose=0))
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    expected = macro(f1_of(y, p > tasks(model)["predictions"].probability_thresholds))
    assert logs["f1"] == pytest.approx(expected, abs=1e-6)


def test_all_forms_of_data_give_the_same(mlp):
    x, y = data()
    weight = np.random.default_rng(1).uniform(0.5, 2, len(y)).astype("float32")
    parts = (x, y, weight)
    expected = lp.choose_thresholds(built(mlp), parts)
    dataset = tf.data.Dataset.from_tensor_slices(parts).shuffle(200).batch(33)
    for given_data in (
        (x.astype("float64"), y.tolist(), list(weight)),
        tuple(map(tf.constant, parts)),
        dataset,
        Batches(*parts),
    ):
        keras.utils.set_random_seed(0)
        np.testing.assert_allclose(
            lp.choose_thresholds(built(mlp), given_data), expected, atol=1e-5
        )


def test_outputs_with_several_steps_have_one_threshold_a_label():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 7, 4)).astype("float32")
    y = (x[..., :2] + rng.normal(size=(30, 7, 2)) > 1).astype("int32")
    backbone = keras.Sequential([keras.Input((7, 4)), keras.layers.Dense(8)])
    model = with_random_heads(lp.transfer_model(backbone, lp.MultiLabel(2), pooling=None))
    thresholds = lp.choose_thresholds(model, (x, y))
    p = sigmoid(model.predict(x, verbose=0)).reshape(-1, 2)
    flat = y.reshape(-1, 2)
    for i, score in enumerate(f1_of(flat, p > thresholds)):
        assert score == pytest.approx(brute_force(p[:, i], flat[:, i], None), abs=1e-12)


def test_several_tasks_get_a_dict_and_a_task_without_labels_keeps_its_own(mlp):
    x, y = data()
    given_tasks = {
        "kind": 3,
        "tags": lp.MultiLabel(LABELS),
        "more": lp.MultiLabel(["a", "b"], thresholds=0.25),
        "age": lp.Regression(),
    }
    model = with_random_heads(lp.multitask_model(mlp(), given_tasks))
    labels = {"tags": y, "kind": np.zeros(len(y), int)}
    model.evaluate(x, labels, verbose=0)
    found = lp.choose_thresholds(model, (x, labels))
    assert list(found) == ["tags"]
    assert tasks(model)["tags"].thresholds == tuple(found["tags"])
    assert tasks(model)["more"].thresholds == (0.25, 0.25)
    labels["more"] = y[:, 1:3]
    p = {name: sigmoid(part) for name, part in model.predict(x, verbose=0).items()}
    logs = model.evaluate(x, labels, verbose=0, return_dict=True)
    assert logs["tags_f1"] == pytest.approx(macro(f1_of(y, p["tags"] > found["tags"])), abs=1e-6)
    assert logs["more_f1"] == pytest.approx(macro(f1_of(y[:, 1:3], p["more"] > 0.25)), abs=1e-6)
    weights = {"tags": np.ones(len(y)), "more": np.arange(len(y)) % 2, "kind": np.ones(len(y))}
    both = lp.choose_thresholds(model, (x, labels, weights))
    assert set(both) == {"tags", "more"}
    np.testing.assert_array_equal(both["tags"], found["tags"])
    odd = lp.choose_thresholds(model, (x[1::2], {"more": y[1::2, 1:3]}))
    np.testing.assert_array_equal(odd["more"], both["more"])


def test_another_f1_of_the_user_keeps_its_thresholds(mlp):
    x, y = data()
    task = lp.MultiLabel(LABELS, metrics=[MacroF1(LABELS, name="f1_at_half")])
    model = built(mlp, task)
    thresholds = lp.choose_thresholds(model, (x, y))
    logits = model.predict(x, verbose=0)
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    assert logs["f1_at_half"] == pytest.approx(macro(f1_of(y, logits > 0)), abs=1e-6)
    assert logs["f1"] == pytest.approx(macro(f1_of(y, sigmoid(logits) > thresholds)), abs=1e-6)


def test_extreme_logits_give_thresholds_that_separate_what_float32_does(mlp):
    model = built(mlp, 1)
    (head,) = heads(model).values()
    head.set_raw_weights(np.zeros((16, 1)), np.array([40.0]))
    x, y = data()
    thresholds = lp.choose_thresholds(model, (x, np.abs(y[:, :1])))
    assert thresholds.tolist() == [0.5]  # all probabilities are 1, so midway to 0
    head.set_raw_weights(np.zeros((16, 1)), np.array([-60.0]))
    (threshold,) = lp.choose_thresholds(model, (x, np.abs(y[:, :1])))
    assert 0 < threshold < 1e-20
    logs = model.evaluate(x, np.abs(y[:, :1]), verbose=0, return_dict=True)
    assert logs["f1"] == pytest.approx(macro(f1_of(np.abs(y[:, :1]), np.ones((200, 1)))), abs=1e-6)


# Where thresholds go


def test_they_survive_files_and_clones_and_what_is_built_on_them(mlp, tmp_path):
    x, y = data()
    model = built(mlp)
    count = len(model.weights)
    thresholds = lp.choose_thresholds(model, (x, y))
    assert len(model.weights) == count
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(logs)
    clone = keras.models.clone_model(model)
    uncompiled = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    tuned = lp.finetune_model(loaded)
    for one in (clone, uncompiled, tuned):
        assert tasks(one)["predictions"].thresholds == tuple(thresholds)
    assert tuned.evaluate(x, y, verbose=0, return_dict=True)["f1"] == pytest.approx(logs["f1"])
    np.testing.assert_array_equal(lp.choose_thresholds(uncompiled, (x, y)), thresholds)


def test_a_file_from_before_there_were_thresholds_has_none():
    config = lp.MultiLabel(2).get_config()
    del config["thresholds"]
    assert lp.MultiLabel.from_config(config).thresholds is None
    config = MacroF1(2).get_config()
    del config["thresholds"]
    assert MacroF1.from_config(config).thresholds is None


def test_decode_predictions_names_the_labels_above_them(mlp):
    x, y = data()
    model = built(mlp, lp.MultiLabel(list("abcde")))
    thresholds = lp.choose_thresholds(model, (x, y))
    logits = model.predict(x, verbose=0)
    decoded = lp.decode_predictions(model, logits, top=None)
    above = sigmoid(logits) > thresholds
    assert [{name for name, _ in row} for row in decoded] == [
        {"abcde"[i] for i in np.flatnonzero(row)} for row in above
    ]
    assert all(row == sorted(row, key=lambda pair: -pair[1]) for row in decoded)
    assert all(len(row) == 2 for row in lp.decode_predictions(model, logits, top=2))


def test_trainable_flags_that_changed_are_still_found(mlp):
    x, y = data()
    model = built(mlp)
    model.layers[1].trainable = True
    lp.choose_thresholds(model, (x, y))
    with pytest.raises(ValueError, match="`trainable` flags"):
        model.fit(x, y, verbose=0)


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x, np.where(y == 0, 2, y)), ValueError, "0 or 1.*y of validation_data"),
        (lambda x, y: (x, y[:, :3]), ValueError, rf"\(examples, {LABELS}\)"),
        (lambda x, y: (x, y[:50]), ValueError, "same number of examples"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "at least one"),
        (lambda x, y: (x, np.full_like(y, -1)), ValueError, "without a label of theirs"),
        (lambda x, y: (x, y, np.zeros(len(y))), ValueError, "without a label of theirs"),
        (lambda x, y: (x, y, -np.ones(len(y))), ValueError, "validation_data with the value -1"),
        (lambda x, y: (x * np.nan, y), ValueError, "finite numbers"),
        (lambda x, y: x, TypeError, "type ndarray"),
        (lambda x, y: iter([(x, y)]), TypeError, "the output of a generator to arrays"),
        (lambda x, y: Batches(x), ValueError, "need labels"),
        (lambda x, y: tf.data.Dataset.from_tensors((x, y)).repeat(), TypeError, r"take\(n\)"),
        (lambda x, y: tf.data.Dataset.from_tensors((x, y)).take(0), ValueError, "an empty data"),
    ],
)
def test_data_that_cannot_be_used_are_refused(mlp, change, error, message):
    model = built(mlp)
    with pytest.raises(error, match=message):
        lp.choose_thresholds(model, change(*data(missing=0)))
    assert tasks(model)["predictions"].thresholds is None


def test_models_without_such_a_task_or_with_nan_are_refused(mlp):
    x, y = data()
    with pytest.raises(ValueError, match=r"lp.MultiLabel task. Received: .*Classification"):
        lp.choose_thresholds(lp.transfer_model(mlp(), 3), (x, y))
    with pytest.raises(ValueError, match="MultiLabel task"):
        lp.choose_thresholds(mlp(), (x, y))
    model = built(mlp)
    heads(model)["predictions"].bias.assign(np.full(LABELS, np.nan))
    with pytest.raises(ValueError, match="NaN of the task 'predictions'"):
        lp.choose_thresholds(model, (x, y))
