import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.finetuning.rate_finder import LearningRates


def model_of(mlp):
    keras.utils.set_random_seed(0)
    return lp.finetune_model(lp.transfer_model(mlp(), 10, dropout=0.3))


def state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(variable) for variable in variables]


def test_everything_is_put_back_exactly(mlp, digits, convnet):
    x = digits[0].reshape(-1, 8, 8, 1)
    keras.utils.set_random_seed(0)
    model = lp.transfer_model(convnet(), 10, pretrained=False, trainable="all", dropout=0.3)
    model.fit(x, digits[1], verbose=0)
    before = state(model)
    lp.find_learning_rate(model, (x, digits[1]), steps=20)
    for old, new in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(new, old)


def test_training_goes_on_as_if_nothing_had_been(mlp, digits):
    losses = []
    for look in (False, True):
        model = model_of(mlp)
        if look:
            lp.find_learning_rate(model, digits, steps=15)
        keras.utils.set_random_seed(1)
        losses.append(model.fit(*digits, epochs=2, verbose=0).history["loss"])
    assert losses[0] == losses[1]


def test_the_suggestions_lie_where_a_quadratic_says():
    """On w^2 SGD diverges from a rate of 1 on; what it suggests must lie well below."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[3.0]])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x = np.ones((32, 1), "float32")
    found = lp.find_learning_rate(model, (x, 0 * x), low=1e-5, high=100, steps=100)
    assert 1e-4 < found.valley < 1
    assert 1e-3 < found.steepest < 1
    assert found.rates[-1] < 100  # it stopped early
    assert len(found.rates) == len(found.losses)
    assert float(model.optimizer.learning_rate) == 0.5
    assert f"{found.valley:.2g}" in str(found)


def test_the_order_is_seeded_and_data_sets_are_taken(mlp, digits):
    model = model_of(mlp)
    first, second = (lp.find_learning_rate(model, digits, steps=12, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.losses, second.losses)
    dataset = tf.data.Dataset.from_tensor_slices(digits).batch(32)
    assert len(lp.find_learning_rate(model, dataset, steps=12).rates) == 12


def test_sample_weights_weigh_the_losses(mlp, digits):
    """Examples of weight 0 do not count, in arrays and in data sets."""
    model = lp.transfer_model(mlp(), 10)
    x, y = digits[0][:64], digits[1][:64]
    wrong = np.where(np.arange(64) < 32, y, (y + 1) % 10)
    weight = (np.arange(64) < 32).astype("float32")
    found = [
        lp.find_learning_rate(model, data, steps=10, high=1e-2, batch_size=64)
        for data in (
            (x, wrong, weight),
            (x, y, weight),
            tf.data.Dataset.from_tensors((x, wrong, weight)),
            (x, wrong, None),
        )
    ]
    np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-5)
    np.testing.assert_allclose(found[0].losses, found[2].losses, rtol=1e-5)
    assert np.abs(found[0].losses - found[3].losses).max() > 1e-3
    with pytest.raises(ValueError, match="finite numbers of 0 or more"):
        lp.find_learning_rate(model, (x, y, -weight))


def test_the_plot_is_a_picture(mlp, digits, tmp_path, capsys):
    found = lp.find_learning_rate(model_of(mlp), digits, steps=15)
    assert capsys.readouterr().out == ""
    found.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_progress(mlp, digits, capsys):
    found = lp.find_learning_rate(model_of(mlp), digits, steps=40, high=1e-3, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(found.rates) == 40
    assert [line.split(" - ")[0] for line in lines] == [
        f"Learning rates {i}/40" for i in range(2, 41, 2)
    ]


@pytest.mark.parametrize(("end", "cut"), [(2.0, False), (40.0, True)])
def test_the_plot_shows_the_fall_where_the_loss_diverges(end, cut):
    losses = np.array([2.0, 2.0, 1.5, 1.0, 1.2, end])
    found = LearningRates(np.geomspace(1e-5, 1, 6), losses, steepest=1e-3, valley=1e-4)
    (axes,) = found.plot().axes
    low, high = axes.get_ylim()
    assert ("cut off above" in axes.get_ylabel()) == cut
    assert low < 1.0
    assert 2.0 < high < 3.0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "valley: 0.0001",
        "steepest: 0.001",
    ]


def test_wrong_input_is_refused(mlp, digits):
    model = model_of(mlp)
    with pytest.raises(ValueError, match="low=1"):
        lp.find_learning_rate(model, digits, low=1, high=0.1)
    with pytest.raises(ValueError, match="steps=3"):
        lp.find_learning_rate(model, digits, steps=3)
    with pytest.raises(ValueError, match="compiled Keras model"):
        lp.find_learning_rate(mlp(), digits)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    with pytest.raises(ValueError, match="a CosineDecay"):
        lp.find_learning_rate(lp.finetune_model(model, learning_rate=schedule), digits)
    empty = tf.data.Dataset.from_tensor_slices(digits).batch(32).take(0)
    with pytest.raises(ValueError, match="0 finite losses"):
        lp.find_learning_rate(model_of(mlp), empty)
