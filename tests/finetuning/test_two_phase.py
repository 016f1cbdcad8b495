import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp


@pytest.fixture
def split(digits):
    x, y = digits
    return (x[:150], y[:150]), (x[150:], y[150:])


def model_of(mlp):
    keras.utils.set_random_seed(0)
    return lp.transfer_model(mlp((16, 16)), 10)


class Rates(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen, self.frozen = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(float(self.model.optimizer.learning_rate))
        self.frozen.append(len(self.model.trainable_variables) == 2)


def test_the_head_comes_first_then_all_with_warm_up_and_cosine(mlp, split):
    train, held = split
    model, rates = model_of(mlp), Rates()
    low = np.array(model.layers[1].layers[0].kernel)
    history = lp.fit_two_phase(
        model, train, head_epochs=2, epochs=4, learning_rate=0.01, batch_size=15,
        validation_data=held, callbacks=[rates], verbose=0,
    )  # fmt: skip
    assert rates.frozen == [True] * 20 + [False] * 40
    assert rates.seen[:20] == pytest.approx([0.01] * 20)
    second = rates.seen[20:]
    assert np.argmax(second) in (3, 4)  # the warm-up is a tenth of 40 steps
    assert max(second) == pytest.approx(0.005, rel=0.01)
    assert second[-1] < 1e-4
    assert second[:4] == sorted(second[:4])
    assert history.epoch == list(range(6))
    assert {len(values) for values in history.history.values()} == {6}
    assert {"loss", "val_loss", "accuracy", "val_accuracy"} <= set(history.history)
    assert np.abs(np.asarray(model.layers[1].layers[0].kernel) - low).max() > 0
    np.testing.assert_allclose(model.optimizer.multipliers[::2], [0.49, 0.7, 1.0])


def test_the_best_weights_on_validation_are_restored(mlp, split):
    train, (x, y) = split
    held = x, (y + 1) % 10  # wrong labels: the better the model fits, the worse it does here
    for restore in (True, False):
        model = model_of(mlp)
        history = lp.fit_two_phase(
            model, train, epochs=8, learning_rate=0.05, validation_data=held,
            restore_best=restore, verbose=0,
        )  # fmt: skip
        loss = model.evaluate(*held, verbose=0, return_dict=True)["loss"]
        wanted = min(history.history["val_loss"]) if restore else history.history["val_loss"][-1]
        assert loss == pytest.approx(wanted, rel=1e-4)
    assert min(history.history["val_loss"]) < history.history["val_loss"][-1]


def test_the_table_shows_training_next_to_validation(mlp, split, capsys):
    train, held = split
    lp.fit_two_phase(
        model_of(mlp), train, epochs=2, learning_rate=0.01, validation_data=held, verbose=2
    )
    lines = capsys.readouterr().out.strip().splitlines()[-4:]
    assert lines[0].split() == ["epoch", "trains", "accuracy", "val_accuracy", "loss", "val_loss"]
    assert [line.split()[:2] for line in lines[1:]] == [["1", "head"], ["2", "all"], ["3", "all"]]
    assert sum("best" in line for line in lines) == 1


def test_data_sets_weights_and_no_head_epochs(mlp, digits):
    dataset = tf.data.Dataset.from_tensor_slices(digits).batch(50)
    history = lp.fit_two_phase(
        model_of(mlp), dataset, head_epochs=0, epochs=2, learning_rate=0.01, verbose=0
    )
    assert history.epoch == [0, 1]
    weighted = (*digits, np.ones(200))
    lp.fit_two_phase(model_of(mlp), weighted, epochs=1, learning_rate=0.01, verbose=0)


def test_any_compiled_keras_model(digits):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8), keras.layers.Dense(10)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = lp.fit_two_phase(model, digits, epochs=2, learning_rate=0.01, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (None, {"epochs": 0}, "epochs=0"),
        (None, {"epochs": 1, "head_epochs": -1}, "head_epochs=-1"),
        (None, {"epochs": 1, "learning_rate": 0}, "learning_rate=0"),
        (None, {"epochs": 1, "batch_size": 0}, "batch_size=0"),
        (3, {"epochs": 1}, "data of type int"),
        ("endless", {"epochs": 1}, "cardinality of -1"),
    ],
)
def test_wrong_input_is_refused_before_training(data, arguments, message, mlp, digits):
    model = model_of(mlp)
    if data == "endless":
        data = tf.data.Dataset.from_tensor_slices(digits).batch(9).repeat()
    with pytest.raises(ValueError, match=message):
        lp.fit_two_phase(model, data or digits, **{"learning_rate": 0.1, **arguments})
    assert int(model.optimizer.iterations) == 0


def test_the_head_is_solved_first(mlp, split):
    train, held = split
    model = model_of(mlp)
    expected = lp.fit_head(model, train, validation_data=held, verbose=0).history
    history = lp.fit_two_phase(model_of(mlp), train, epochs=3, validation_data=held, verbose=0)
    assert history.epoch == [0, 1, 2, 3]
    assert {len(values) for values in history.history.values()} == {4}
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert history.history[name][0] == pytest.approx(expected[name][0], abs=1e-6)
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_the_solved_head_can_be_the_best(mlp, split):
    train, (x, y) = split
    model = model_of(mlp)
    history = lp.fit_two_phase(
        model, train, epochs=2, learning_rate=1.0, validation_data=(x, y), verbose=0
    )
    losses = history.history["val_loss"]
    assert losses[0] == min(losses)
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(losses[0], rel=1e-5)


def test_a_head_that_cannot_be_solved_trains_for_an_epoch(mlp, split, capsys):
    train, held = split
    model = lp.transfer_model(mlp(), 10, hidden_units=[8])
    history = lp.fit_two_phase(model, train, epochs=1, validation_data=held, verbose=2)
    assert history.epoch == [0, 1]
    assert "Head solved" not in capsys.readouterr().out


def test_the_default_rate_is_that_of_the_range_test(mlp, split, capsys):
    train, _ = split
    one, two = model_of(mlp), model_of(mlp)
    lp.fit_head(one, train, verbose=0)
    lp.finetune_model(one, learning_rate=1e-3, layer_decay=0.7)
    valley = lp.find_learning_rate(one, train, batch_size=10).valley
    lp.fit_two_phase(two, (*train, np.ones(len(train[0]))), epochs=1, batch_size=10, verbose=2)
    schedule = two.optimizer._learning_rate
    assert schedule.warmup_target == pytest.approx(valley, rel=1e-3)
    assert f"Learning rate by find_learning_rate: {2 * valley:.1e}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="learning_rate='fast'"):
        lp.fit_two_phase(two, train, epochs=1, learning_rate="fast")


def test_the_range_test_takes_one_hot_labels_and_names(mlp, split):
    x, y = split[0]
    names = list("abcdefghij")
    model = lp.transfer_model(mlp(), names, trainable="all")
    found = [
        lp.find_learning_rate(model, (x, labels)).valley
        for labels in (y, np.array(names)[y], np.eye(10)[y])
    ]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)
