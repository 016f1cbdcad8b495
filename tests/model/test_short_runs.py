"""Short runs: moving averages that keep up, and a line where training ended too early."""

import keras
import pytest
import tensorflow as tf

import keras_lp as lp

WORD = "The loss still fell by"


def scratch(convnet, **options):
    return lp.transfer_model(convnet(), 10, pretrained=False, trainable="all", **options)


class Momentum(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        layer = self.model.layers[1].get_layer("block1_bn")
        self.seen.append(layer.momentum)


def momentum_in(model, *data, **options):
    look = Momentum()
    model.fit(*data, verbose=0, callbacks=[look], **options)
    assert model.layers[1].get_layer("block1_bn").momentum == 0.99  # as it was
    return look.seen[-1]


@pytest.fixture
def pictures(digits):
    return digits[0].reshape(200, 8, 8, 1), digits[1]


def test_the_memory_is_a_tenth_of_the_steps(convnet, pictures):
    model = scratch(convnet)
    assert momentum_in(model, *pictures, epochs=4, batch_size=8) == pytest.approx(1 - 10 / 100)
    assert momentum_in(model, *pictures, epochs=4, batch_size=8) == pytest.approx(1 - 10 / 200)
    model.optimizer.iterations.assign(2000)
    assert momentum_in(model, *pictures) == 0.99  # a long run
    dataset = tf.data.Dataset.from_tensor_slices(pictures).batch(8)
    assert momentum_in(scratch(convnet), dataset, epochs=4) == pytest.approx(0.9)
    options = {"steps_per_epoch": 5, "epochs": 10}
    assert momentum_in(scratch(convnet), dataset.repeat(), **options) == pytest.approx(0.8)
    split = {"validation_split": 0.5, "batch_size": 5, "epochs": 2}
    assert momentum_in(scratch(convnet), *pictures, **split) == pytest.approx(1 - 10 / 40)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_frozen_and_unknown_lengths_are_left_alone(convnet, pictures):
    assert momentum_in(lp.transfer_model(convnet(), 10), *pictures) == 0.99
    unknown = tf.data.Dataset.from_tensor_slices(pictures).batch(8).filter(lambda x, y: True)
    assert momentum_in(scratch(convnet), unknown) == 0.99


def test_the_momentum_comes_back_after_an_error(convnet, pictures):
    model = scratch(convnet)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(*pictures, verbose=0, callbacks=[Stop()])
    assert model.layers[1].get_layer("block1_bn").momentum == 0.99


def test_evaluate_judges_the_network_that_trained(convnet, monkeypatch):
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    accuracy = {}
    for memories in (10, 0):
        monkeypatch.setattr("keras_lp.model.short_runs.MEMORIES", memories)
        keras.utils.set_random_seed(0)
        model = scratch(convnet)
        model.fit(x, y, epochs=2, verbose=0)
        accuracy[memories] = model.evaluate(x, y, verbose=0)[1]
    assert accuracy[10] > 0.6
    assert accuracy[10] > accuracy[0] + 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 3}, ["solve the head with lp.fit_head(model, data)", "lp.find_learning_rate"]),
        ({"epochs": 3, "verbose": 0}, None),
        ({"epochs": 1}, None),
        ({"epochs": 3, "learning_rate": 1e-6}, None),  # it hardly falls
        ({"epochs": 3, "stop": True}, None),
    ],
)
def test_a_line_says_that_the_loss_still_fell(mlp, digits, capsys, options, words):
    options = {"verbose": 2, **options}
    model = lp.transfer_model(mlp(), 10, learning_rate=options.pop("learning_rate", 0.01))
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1)
    callbacks = [stop] if options.pop("stop", False) else []
    history = model.fit(*digits, callbacks=callbacks, **options).history
    out = capsys.readouterr().out
    assert (WORD in out) == (words is not None)
    if words:
        fall = 1 - history["loss"][-1] / history["loss"][-2]
        line = out.splitlines()[-1]
        assert line.startswith(f"{WORD} {100 * fall:.0f} % in the last epoch: ")
        assert all(word in line for word in words)


def test_a_line_without_fit_head_where_it_cannot_help(mlp, digits, capsys):
    model = lp.transfer_model(mlp(), 10, hidden_units=[32], learning_rate=0.01)
    model.fit(*digits, epochs=5, verbose=2)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(WORD)
    assert "fit_head" not in line
