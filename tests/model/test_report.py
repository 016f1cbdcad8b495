import keras
import pytest

import keras_lp as lp


def rows(model):
    text = []
    lp.trainable_report(model, print_fn=text.append)
    lines = text[0].splitlines()
    lines = [line for line in lines if not line.startswith("features: ")]
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return cells[1:-1], lines[-1]


def test_a_frozen_model(mlp):
    assert rows(lp.transfer_model(mlp((16, 8)), 3)) == (
        [
            ["block0", "1,040", "frozen", "-"],
            ["block1", "136", "frozen", "-"],
            ["predictions", "27", "27", "0.01"],
        ],
        "trainable parameters: 27 of 1,203, 2.24 %",
    )


def test_layer_decay_shows_in_the_rates(mlp):
    model = lp.finetune_model(
        lp.transfer_model(mlp((16, 8)), 3), learning_rate=0.1, layer_decay=0.5
    )
    lines, total = rows(model)
    assert [line[3] for line in lines] == ["0.025", "0.05", "0.1"]
    assert total.endswith("100.00 %")


def test_a_block_of_several_layers_and_frozen_normalisation(convnet):
    model = lp.finetune_model(lp.transfer_model(convnet(), 3), trainable=1)
    lines, _ = rows(model)
    bottom, top, head = lines
    assert bottom == ["block1_conv to block1_bn", str(8 * 9 + 8 + 4 * 8), "frozen", "-"]
    assert top[0] == "block2_conv to block2_bn"
    assert top[1:3] == [str(8 * 8 * 9 + 8 + 4 * 8), str(8 * 8 * 9 + 8)]
    assert head[0] == "predictions"


def test_any_keras_model_and_a_schedule_and_mixed_precision():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(2, name="b")]
    )
    assert [line[3] for line in rows(model)[0]] == ["-", "-"]  # not compiled: no rate
    schedule = keras.optimizers.schedules.CosineDecay(0.25, 10)
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(schedule)), "mse")
    assert [line[3] for line in rows(model)[0]] == ["0.25", "0.25"]
    warm = keras.optimizers.schedules.CosineDecay(0.01, 5, warmup_target=0.5, warmup_steps=5)
    model.compile(keras.optimizers.SGD(warm), "mse")
    model.optimizer.iterations.assign(10)
    assert float(model.optimizer.learning_rate) == 0
    assert [line[3] for line in rows(model)[0]] == ["0.5", "0.5"]  # the peak
    model.compile(keras.optimizers.MultiOptimizer(lambda _: keras.optimizers.SGD()), "mse")
    assert [line[3] for line in rows(model)[0]] == ["-", "-"]
    assert [line[0] for line in rows(model)[0]] == ["a", "b"]


def test_several_tasks_and_hidden_layers(mlp, capsys):
    model = lp.multitask_model(mlp(), {"x": 2, "y": lp.Regression()}, hidden_units=[4])
    lp.trainable_report(model)
    text = capsys.readouterr().out
    for name in ("block0", "x_hidden_0", "y_hidden_0", "x ", "y "):
        assert name in text
    trains = model.count_params() - 2  # not the mean and deviation of the regression's labels
    assert f"{trains:,} of {model.count_params():,}" in text


@pytest.mark.parametrize("model", [None, keras.Sequential([keras.layers.Dense(3)])])
def test_a_model_without_weights_is_refused(model):
    with pytest.raises(ValueError, match="a Keras model with weights"):
        lp.trainable_report(model)


@pytest.mark.parametrize(
    ("pooling", "line"),
    [
        ("auto", "features: 4 x 4 x 8, flattened to 128"),
        ("avg", "features: 4 x 4 x 8, the average of each channel"),
        ("max", "features: 4 x 4 x 8, the maximum of each channel"),
    ],
)
def test_the_pooling_is_named(convnet, pooling, line, capsys):
    lp.trainable_report(lp.transfer_model(convnet(), 3, pooling=pooling))
    assert capsys.readouterr().out.splitlines()[-2] == line
