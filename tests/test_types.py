"""What a type checker makes of code that uses the package."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import keras_lp as lp
from keras_lp.balancing.ways import METHODS, BalancingName
from keras_lp.tasks.classification import MetricName

ROOT = Path(__file__).parents[1]

# Uses every public name. The comment after a `reveal_type` is the type that must be told.
RIGHT = """
import keras
import keras_lp as lp
import numpy as np

x, y = np.zeros((8, 4)), np.zeros(8)
train = lp.load_dataset("digits", split="train", batch_size=None)
backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
one = lp.Classification(["cat", "dog"], class_weight="balanced", loss="focal", metrics=["f1"])
many = lp.MultiLabel(3, thresholds={"0": 0.3}, metrics=["auc", keras.metrics.AUC()])
number = lp.Regression(mean=1, std=2)
model = lp.transfer_model(backbone, one, trainable="head", pooling="avg", cache_features=False)
reveal_type(model)  # keras_lp.model.model.Model
reveal_type(model.fit(x, y, verbose=0))  # keras.src.callbacks.history.History
model.fit(x, y, class_weight={"cat": 2}, callbacks=[lp.GradualUnfreezing(0.5)], verbose=False)
reveal_type(lp.fit_head(model, (x, y), l2="auto"))  # keras.src.callbacks.history.History
rates = lp.find_learning_rate(model, (x, y), steps=50)
reveal_type(rates)  # keras_lp.finetuning.rate_finder.LearningRates
reveal_type(rates.valley)  # float
found: lp.LearningRates = rates
tuned = lp.finetune_model(model, ["cat", "dog"], trainable=["a"], lora=lp.LoRA(rank=4))
reveal_type(tuned)  # keras.src.models.model.Model
lp.fit_two_phase(model, (x, y), epochs=2, learning_rate=1e-3, verbose="auto")
lp.save_adapters(tuned, "a.npz")
lp.merge_adapters(lp.load_adapters(tuned, "a.npz"))
layered = lp.layerwise(keras.optimizers.Adam(), model, layer_decay=0.5)
reveal_type(layered)  # keras.src.optimizers.optimizer.Optimizer
tasks = {"a": one, "b": many, "c": number}
both = lp.multitask_model("MobileNetV2", tasks, balancing="pcgrad", augmentation="light")
own: lp.Balancing = lp.balancing.Uncertainty()
lp.multitask_model(backbone, tasks, balancing=own, optimizer=keras.optimizers.Adam(), trainable=2)
lp.multitask_model(backbone, {"a": 2, "b": 3}, balancing={"a": 1, "b": 2.0}, weights=None)
both.fit(lp.mix({"a": (x, y), "b": (x, y)}, temperature=2), epochs=2)
compared = lp.compare_single_tasks(both, (x, y), validation_data=(x, y), epochs=1)
reveal_type(compared)  # keras_lp.multitask.comparison.Comparison
again: lp.Comparison = compared
reveal_type(lp.class_names(model))  # dict[str, list[str]]
reveal_type(lp.plain_model(model))  # keras.src.models.model.Model
lp.trainable_report(model, print_fn=print)
made: lp.Report = lp.report(model, {"loss": [1.0]}, (x, y), path=None)
reveal_type(made.card)  # str
privacy = lp.DifferentialPrivacy(epsilon=8, delta=1e-5, clip="adaptive")
lp.fit_head(model, (x, y), privacy=privacy)
private = lp.FederatedAveraging(model, privacy=privacy, clients_per_round=2)
reveal_type(private.privacy_report().epsilon)  # float
lp.FederatedAveraging(model, compression=lp.Quantize(bits=4), aggregation="krum")
lp.FederatedAveraging(model, compression=lp.TopK(0.1))
leakage = lp.audit_update_leakage(model, x, y, defense=[None, lp.Quantize(1), "batch"])
reveal_type(leakage.results["none"].read)  # int
member = lp.audit_membership(model, (x, y), (x, y), train=lambda x, y: model)
leakage.save("a.html", {"Members": member})
kept = lp.FederatedAveraging(model, personal_layers="head", lora_ranks={"client_0": 2})
reveal_type(kept.client_model("client_0"))  # keras.src.models.model.Model
lp.FederatedAveraging(model, personal_layers=["a"], lora_averaging="exact")
parts = lp.split_clients(lp.partition((x, y), 2), held_out=0.5)
personal: lp.PersonalModels = lp.personalize(private, *parts, epochs=2)
reveal_type(personal.model("client_0"))  # keras.src.models.model.Model
lp.choose_thresholds(both, (x, y))
calibrated: lp.Calibration = lp.calibrate(both, (x, y))
reveal_type(calibrated.tasks["a"].temperature)  # float
lp.decode_predictions(both, both.predict(x), top=None)
hyper = lp.TransferHyperModel(backbone, 3, dropout=lambda hp: hp.Float("a", 0, 0.5))
found2 = lp.tune(hyper, (x, y), max_trials=3, tuner="random", objective="val_loss", directory="d")
reveal_type(found2)  # keras_lp.tuning.result.TuningResult
result2: lp.TuningResult = found2
reveal_type(found2.refit((x, y)))  # keras.src.models.model.Model
lp.tune(lp.FinetuneHyperModel("MobileNet", ["a", "b"], lora="search"), (x, y), max_trials=30)
lp.tune(lp.MultitaskHyperModel(backbone, tasks, balancing="equal"), (x, y), max_trials=30)
lp.FederatedHyperModel(backbone, tasks, local_epochs=2)
lp.load_folder("images", split="validation", image_size=(64, 96), channels=1, batch_size=None)
encoder: lp.TextEncoder = lp.TextEncoder.fit(["a"], level="word")
clients = lp.partition((x, y), clients=2, alpha=0.5)
reveal_type(lp.describe_clients(clients).examples)  # dict[Any, int]
federated = lp.FederatedAveraging(model, server_optimizer="adam", weighting="uniform")
reveal_type(federated.fit(clients, rounds=2))  # keras.src.callbacks.history.History
reveal_type(federated.evaluate(clients))  # dict[str, float]
report = lp.export_tflite(
    model, "a.tflite", quantization="int8", metadata=lp.TFLiteMetadata(mean=0.5)
)
reveal_type(report.size)  # int
lp.export_trainable_tflite(model, "b.tflite", optimizer="momentum", trainable="all")
phone = lp.DeviceTrainer("b.tflite")
reveal_type(phone.fit(x, y))  # list[float]
reveal_type(lp.aggregate_device_updates(model, [phone.get_weights()]).refused)  # dict[int, str]
page = lp.export_web(model, "page", trainable="head", feature_names=["a", "b", "c", "d"])
reveal_type(page.size)  # int
server: lp.PhoneServer = lp.phone_server(model, "s", clients_per_round=2, rounds=3, privacy=privacy)
reveal_type(server.history)  # dict[str, list[float]]
with lp.federated_workers(["127.0.0.1:8500"], timeout=5):
    federated.fit(clients, rounds=1)
fleet: lp.FlowerApp = lp.flower_app(model, lambda context: (x, y), rounds=3, local_epochs=2)
reveal_type(lp.PhoneClient("http://127.0.0.1").round())  # dict[str, Any]


def name_of(any_model: lp.Model) -> str:
    return any_model.name
"""

# Each line is wrong in one place, which the checker must report with this code.
WRONG = [
    ("lp.transfr_model(backbone, 2)", "attr-defined"),
    ("lp.transfer_model(backbone)", "call-arg"),
    ("lp.transfer_model(backbone, 2, trainble='all')", "call-arg"),
    ("lp.transfer_model(backbone, 2.5)", "arg-type"),
    ("lp.transfer_model(backbone, 2, trainable='heads')", "arg-type"),
    ("lp.transfer_model(backbone, 2, pooling='average')", "arg-type"),
    ("lp.transfer_model(backbone, 2, augmentation='hard')", "arg-type"),
    ("lp.transfer_model(backbone, 2, cache_features='always')", "arg-type"),
    ("lp.multitask_model(backbone, {'a': 2}, balancing='pc_grad')", "arg-type"),
    ("lp.multitask_model(backbone, [2, 3])", "arg-type"),
    ("lp.Classification(2, loss='hinge')", "arg-type"),
    ("lp.Classification(2, class_weight='equal')", "arg-type"),
    ("lp.Classification(2, metrics=['f2'])", "list-item"),
    ("lp.MultiLabel(2, metrics=['f1'])", "list-item"),
    ("lp.Regression(2, mean='auto')", "arg-type"),
    ("epochs: int = model.fit(x, y)", "assignment"),
    ("model.fit(x, y, verbose='no')", "arg-type"),
    ("model.fit(x, y, class_weight='balance')", "arg-type"),
    ("lp.fit_head(model, (x, y), l2='best')", "arg-type"),
    ("lp.fit_two_phase(model, (x, y), epochs=2, learning_rate='best')", "arg-type"),
    ("lp.finetune_model(model, layer_decay='auto')", "arg-type"),
    ("lp.find_learning_rate(model, (x, y)).best", "attr-defined"),
    ("lp.FederatedAveraging(model, weighting='size')", "arg-type"),
    ("lp.FederatedAveraging(model).fit(x)", "call-arg"),
    ("lp.partition((x, y), client=3)", "call-arg"),
    ("lp.export_tflite(model, 'a.tflite', quantization='int4')", "arg-type"),
    ("lp.export_trainable_tflite(model, 'a.tflite', optimizer='adamw')", "arg-type"),
    ("loss: str = lp.DeviceTrainer('a.tflite').evaluate(x, y)['loss']", "assignment"),
]
START = """import keras
import keras_lp as lp
import numpy as np

x, y = np.zeros((8, 4)), np.zeros(8)
backbone: keras.Model = keras.Sequential([keras.Input((4,))])
model = lp.transfer_model(backbone, 2)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The messages of the checker by file and number of the line."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(START + "".join(f"{line}\n" for line, _ in WRONG))
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", folder / "cache"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "right.py", "wrong.py"],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # 2 where the checker itself fails
    messages = {}
    for message in done.stdout.splitlines():
        if place := re.match(r"(\w+\.py):(\d+): (.*)", message):
            messages.setdefault((place[1], int(place[2])), []).append(place[3])
        else:
            assert message.startswith("Found "), message  # no error is in the package
    return messages


def test_correct_code_has_no_error(told):
    errors = {place: one for place, one in told.items() if place[0] == "right.py"}
    assert not [one for each in errors.values() for one in each if one.startswith("error")], errors
    for name in lp.__all__:
        assert re.search(rf"\blp\.{name}\b", RIGHT), name


def test_types_are_known(told):
    wanted = {
        i: line.split("  # ")[1]
        for i, line in enumerate(RIGHT.splitlines(), 1)
        if line.startswith("reveal_type")
    }
    assert wanted
    for i, kind in wanted.items():
        (message,) = told["right.py", i]
        assert message.endswith(f'"{kind}"'), message


@pytest.mark.parametrize("i", range(len(WRONG)), ids=[line for line, _ in WRONG])
def test_wrong_code_is_reported(told, i):
    code = WRONG[i][1]
    messages = told.get(("wrong.py", START.count("\n") + 1 + i), [])
    assert any(one.startswith("error") and one.endswith(f"[{code}]") for one in messages), messages


def test_choices_are_those_that_are_there():
    assert {*get_args(BalancingName)} == {"equal", "sum", *METHODS}
    assert {*get_args(MetricName)} == {*lp.Classification.named_metrics}
