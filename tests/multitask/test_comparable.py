"""The default sum of the tasks: the mean loss of `MultiLabel` counts once for each label."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.balancing.ways import balancing_of
from keras_lp.federated.engine import installation
from tests.conftest import assert_same, snapshot

TASKS = {
    "digit": lp.Classification(10, weight=0.5),
    "tags": lp.MultiLabel(3),
    "centre": lp.Regression(2, mean=[1.0, 2.0], std=[2.0, 4.0]),
}


@pytest.fixture
def examples(digits):
    x, y = digits
    tags = np.stack([y % 2, y > 4, y == 0], 1)
    tags[::3] = -1
    tags[1::3, 2] = -1
    centre = np.stack([y / 3, y**2 / 10], 1).astype("float32")
    centre[5:90, 1] = np.nan
    return x, {"digit": np.where(np.arange(200) % 4, y, -1), "tags": tags, "centre": centre}


@pytest.fixture
def build(mlp):
    def make(balancing="equal", tasks=TASKS, **options):
        keras.utils.set_random_seed(1)
        options = {"optimizer": "sgd", "learning_rate": 0.05, **options}
        return lp.multitask_model(mlp(), tasks, balancing=balancing, **options)

    return make


def mean_losses(model, x, y):
    """In NumPy, over the labels that are there."""
    outputs = {name: np.asarray(value, "float64") for name, value in model(x).items()}
    here = y["digit"] >= 0
    logits = outputs["digit"][here]
    digit = np.log(np.exp(logits).sum(-1)) - logits[np.arange(here.sum()), y["digit"][here]]
    here = y["tags"] >= 0
    tags = np.log1p(np.exp(outputs["tags"])) - y["tags"] * outputs["tags"]
    centre = ((outputs["centre"] - y["centre"]) / [2.0, 4.0]) ** 2
    return {"digit": digit.mean(), "tags": tags[here].mean(), "centre": np.nanmean(centre)}


OWN = {"digit": 0.5, "tags": 1.0, "centre": 1.0}  # weights of the tasks
LABELS = {"digit": 1, "tags": 3, "centre": 1}  # how often a mean counts


@pytest.mark.parametrize(
    ("balancing", "given"),
    [
        ("equal", LABELS),
        ("sum", dict.fromkeys(TASKS, 1)),
        ({"digit": 2.0, "tags": 0.1, "centre": 0.0}, {"digit": 2.0, "tags": 0.3, "centre": 0.0}),
        ("dwa", LABELS),
        ("pcgrad", LABELS),
        (lp.Balancing(), LABELS),
    ],
)
def test_the_loss_is_the_one_worked_out_by_hand(balancing, given, build, examples):
    x, y = examples
    model = build(balancing)
    means = mean_losses(model, x, y)
    expected = sum(OWN[task] * given[task] * mean for task, mean in means.items())
    for logs in (
        model.evaluate(x, y, verbose=0, return_dict=True),
        {k: v[0] for k, v in model.fit(x, y, batch_size=200, verbose=0).history.items()},
    ):
        assert logs["loss"] == pytest.approx(expected, rel=1e-5)
        for task, mean in means.items():
            assert logs[f"{task}_loss"] == pytest.approx(mean, rel=1e-5)


def test_sum_trains_as_plain_keras_with_its_mean_losses(mlp, digits):
    x, y = digits
    labels = {"digit": y, "tags": np.stack([y % 2, y > 4, y == 0], 1).astype("float32")}
    model = lp.multitask_model(
        mlp(), {"digit": 10, "tags": lp.MultiLabel(3)}, balancing="sum", optimizer="sgd"
    )
    plain = keras.models.clone_model(model)
    plain = keras.Model(plain.inputs, plain.output)
    plain.set_weights(model.get_weights())
    plain.compile(
        keras.optimizers.SGD(0.01),
        {
            "digit": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "tags": keras.losses.BinaryCrossentropy(from_logits=True),
        },
    )
    for each in (model, plain):
        each.fit(x, labels, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_equal_is_sum_with_the_labels_as_weights(build, examples):
    x, y = examples
    weighted = {
        "digit": TASKS["digit"],
        "tags": lp.MultiLabel(3, weight=3.0),
        "centre": TASKS["centre"],
    }
    models = [build("equal"), build("sum", weighted), build(lp.Balancing())]
    for model in models:
        model.fit(x, y, shuffle=False, verbose=0)
    for model in models[1:]:
        for a, b in zip(models[0].get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_single_task_keeps_its_mean(mlp, examples):
    x, y = examples
    model = lp.transfer_model(mlp(), lp.MultiLabel(3), optimizer="sgd")
    logits, here = np.asarray(model(x), "float64"), y["tags"] >= 0
    expected = (np.log1p(np.exp(logits)) - y["tags"] * logits)[here].mean()
    loss = model.evaluate(x, y["tags"], verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("balancing", ["equal", "sum", {"digit": 1.0, "tags": 2.0, "centre": 0.5}])
def test_saved_and_fine_tuned_models_go_on_with_the_same_sum(balancing, build, examples, tmp_path):
    x, y = examples
    model = build(balancing, optimizer="adam")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        keras.utils.set_random_seed(3)
        each.fit(x, y, verbose=0)
    assert_same(snapshot(model), snapshot(loaded))
    loss = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    tuned = lp.finetune_model(loaded)
    assert tuned.evaluate(x, y, verbose=0, return_dict=True)["loss"] == pytest.approx(loss)


def test_uncertainty_has_a_variance_for_the_labels_together(build, examples):
    """s follows the gradient of exp(-s) L + n s / 2, divided by n: that of the mean loss."""
    x, y = examples
    model = build(lp.balancing.Uncertainty(learning_rate=0.1))
    means = mean_losses(model, x, y)
    model.fit(x, y, batch_size=200, verbose=0)
    factors = {"digit": 0.5, "tags": 1.0, "centre": 0.5}  # its weight; classes; numbers
    expected = [-0.1 * (0.5 - factors[task] * means[task]) for task in TASKS]
    np.testing.assert_allclose(balancing_of(model).log_variances, expected, atol=1e-5)


@pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
def test_a_client_minimises_the_same_sum(build, examples):
    x, y = examples
    federated, central = build(), build()
    history = lp.FederatedAveraging(federated, batch_size=None).fit(
        {"only": (x, y)}, rounds=1, verbose=0
    )
    logs = central.fit(x, y, batch_size=200, verbose=0).history
    assert history.history["loss"][0] == pytest.approx(logs["loss"][0], rel=1e-5)
    for a, b in zip(federated.get_weights(), central.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rare_labels_are_learned_next_to_another_task():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 40)).astype("float32")
    rare = (x @ rng.normal(size=(40, 28)) / 40**0.5 > 2.0).astype("int32")
    topic = (x @ rng.normal(size=(40, 4))).argmax(1)

    def recall(balancing):
        keras.utils.set_random_seed(0)
        net = keras.Sequential([keras.Input((40,)), keras.layers.Dense(64, "relu")])
        options = {"pooling": None, "pretrained": False, "learning_rate": 3e-3}
        if balancing is None:
            model, y = lp.transfer_model(net, lp.MultiLabel(28), trainable="all", **options), rare
        else:
            tasks, y = {"rare": lp.MultiLabel(28), "topic": 4}, {"rare": rare, "topic": topic}
            model = lp.multitask_model(net, tasks, balancing=balancing, **options)
        model.steps_per_execution = 63
        model.fit(x, y, batch_size=64, epochs=8, verbose=0)
        logits = model.predict(x, batch_size=1000, verbose=0)
        found = logits if balancing is None else logits["rare"]
        return ((found > 0) & (rare > 0)).sum() / rare.sum()

    alone = recall(None)
    assert alone > 0.4
    assert recall("sum") < 0.5 * alone
    assert recall("equal") > 0.8 * alone
