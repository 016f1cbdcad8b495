"""Fleets in one process: the same weights as FederatedAveraging, and what may go wrong."""

import json

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.federated.fleet.__main__ import main as command
from keras_lp.federated.fleet.messages import from_record, to_record

pytest.importorskip("flwr")
from flwr.app import Context, Message, RecordDict

from tests.federated.fleet.grid import Grid

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="compares with TFF, on Linux x86-64"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clients():
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x = x[:240].reshape(-1, 64).astype("float32") / 255
    return dict(enumerate(lp.partition((x, y[:240]), clients=3, alpha=1.0, seed=0).values()))


def run(model, clients, tmp_path, rounds=2, troubles=None, **options):
    """Runs a fleet in this process; returns its grid."""
    app = lp.flower_app(
        model, lambda context: clients[context.node_config["partition-id"]],
        rounds=rounds, output=tmp_path / "output", **options,
    )  # fmt: skip
    grid = Grid(app.client, {100 + i: {"partition-id": i} for i in clients}, troubles)
    app.server(grid, Context(1, 1, {}, RecordDict(), {}))
    return grid


def single(mlp, **options):
    keras.utils.set_random_seed(0)
    options = {"trainable": "all", "optimizer": "sgd", "learning_rate": 0.1, **options}
    return lp.transfer_model(mlp((16,)), 10, pretrained=False, pooling=None, **options)


def frozen(mlp):
    """Its features are standardised by sums over the clients before the first round."""
    return lp.transfer_model(single(mlp), 10, pooling=None, optimizer="sgd", learning_rate=0.1)


def balanced(mlp):
    task = lp.Classification(10, class_weight="balanced", metrics=["f1"])
    keras.utils.set_random_seed(0)
    return lp.transfer_model(
        mlp((16,)), task, pretrained=False, pooling=None, trainable="all", optimizer="sgd"
    )


def with_layer_rates(mlp):
    return lp.finetune_model(single(mlp), learning_rate=0.05, layer_decay=0.5, optimizer="sgd")


def with_adapters(mlp):
    return lp.finetune_model(single(mlp), lora=lp.LoRA(2), learning_rate=0.05, optimizer="sgd")


def several_tasks(mlp):
    keras.utils.set_random_seed(0)
    tasks = {"digit": 10, "even": lp.MultiLabel(["even"]), "value": lp.Regression()}
    return lp.multitask_model(
        mlp((16,)), tasks, pretrained=False, trainable="all", pooling=None, optimizer="sgd"
    )


def several_labels(clients):
    """Labels of three tasks, some of which are missing."""
    return {
        i: (
            x,
            {
                "digit": np.where(np.arange(len(y)) % 3 == i, -1, y),
                "even": (y % 2 == 0).astype("float32")[:, None],
                "value": np.where(np.arange(len(y)) % 2 == 0, np.nan, y).astype("float32")[:, None],
            },
        )
        for i, (x, y) in clients.items()
    }


CASES = {
    "mean": (single, {"local_epochs": 2}),
    "samples": (single, {"clients_per_round": 2, "seed": 3}),
    "proximal": (single, {"proximal_strength": 0.5, "local_epochs": 2, "batch_size": None}),
    "server Adam": (single, {"server_optimizer": "adam"}),
    "uniform": (single, {"weighting": "uniform"}),
    "median": (single, {"aggregation": "median"}),
    "private": (
        single,
        {"privacy": lp.DifferentialPrivacy(delta=1e-3, noise_multiplier=1.0, clip=0.1, seed=0)},
    ),
    "frozen": (frozen, {}),
    "balanced classes": (balanced, {}),
    "layer rates": (with_layer_rates, {}),
    "adapters": (with_adapters, {}),
    "several tasks": (several_tasks, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fleet_equals_federated_averaging(case, clients, mlp, tmp_path):
    make, settings = CASES[case]
    if make is several_tasks:
        clients = several_labels(clients)
    here, there = make(mlp), make(mlp)
    start = here.get_weights()
    history = lp.FederatedAveraging(here, **settings).fit(clients, rounds=2, verbose=0).history
    run(there, clients, tmp_path, **settings)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(start, here.get_weights(), strict=True))
    for ours, theirs in zip(there.get_weights(), here.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    written = json.loads((tmp_path / "output" / "history.json").read_text())
    for name in {"loss", "accuracy", "digit_accuracy", "epsilon", "update_norm"} & set(history):
        assert written[name] == pytest.approx(history[name], rel=1e-4, nan_ok=True)


def updates(grid):
    """The contents of the messages that ask for an update."""
    found = [from_record(content) for _, content in grid.sent]
    return [(values, arrays) for values, arrays in found if values["work"] == "update"]


def test_the_model_travels_once_and_frozen_weights_never_again(clients, mlp, tmp_path):
    grid = run(frozen(mlp), clients, tmp_path, rounds=2)
    works = [from_record(content)[0]["work"] for _, content in grid.sent]
    assert works.count("model") == len(clients)
    sent = updates(grid)
    assert len(sent) == 2 * len(clients)
    for _, arrays in sent:  # kernel, bias, and the scale of the features
        assert [array.shape for array in arrays] == [(16, 10), (10,), (16,), (16,)]
    # Another run, and another process of the node, finds the model in the cache.
    grid = run(frozen(mlp), clients, tmp_path / "other", rounds=1)
    assert "model" not in [from_record(content)[0]["work"] for _, content in grid.sent]


def nan(reply):
    """The answer of a node with numbers that are not finite, which it does not admit."""
    values, arrays = from_record(reply.content)
    arrays[0] = arrays[0] * np.nan
    reply.content = to_record(values, arrays)
    return reply


def other_form(reply):
    values, arrays = from_record(reply.content)
    arrays[0] = arrays[0][:2]
    reply.content = to_record(values, arrays)
    return reply


def nonsense(reply):
    reply.content = to_record({"counts": "many"}, [])
    return reply


FIRST_UPDATE = 3  # after hello, model and form


@pytest.mark.parametrize(
    "trouble", ["silent", ValueError("the disk is full"), nan, other_form, nonsense]
)
@pytest.mark.filterwarnings("ignore:1 of 3 nodes are left out")
@pytest.mark.filterwarnings("ignore:Round 1. the updates of 1 of 3 clients")
def test_a_node_in_trouble_costs_its_update_and_nothing_else(trouble, clients, mlp, tmp_path):
    here, there = single(mlp), single(mlp)
    others = {i: data for i, data in clients.items() if i != 1}
    options = {"batch_size": None}  # no shuffling, which depends on the place among the clients
    federated = lp.FederatedAveraging(here, **options)
    federated.fit(others, rounds=1, verbose=0)
    federated.fit(clients, rounds=1, verbose=0)
    deadline = {"deadline": 0.3} if trouble == "silent" else {}
    run(there, clients, tmp_path, troubles={(101, FIRST_UPDATE): trouble}, **options, **deadline)
    for ours, theirs in zip(there.get_weights(), here.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    written = json.loads((tmp_path / "output" / "history.json").read_text())
    absent = 0 if callable(trouble) else 1
    assert (written["absent"], written["dropped"]) == ([absent, 0], [1 - absent, 0])


def test_a_run_whose_nodes_all_fail_fails_with_their_errors(clients, mlp, tmp_path):
    troubles = {(100 + i, FIRST_UPDATE): OSError(f"disk {i} is full") for i in clients}
    with pytest.raises(RuntimeError, match=r"'update'.*disk 0 is full.*disk 2 is"):
        run(single(mlp), clients, tmp_path, troubles=troubles)


def test_a_round_without_any_finite_update_ends_the_run(clients, mlp, tmp_path):
    model = single(mlp)
    start = model.get_weights()
    troubles = {(100 + i, FIRST_UPDATE): nan for i in clients}
    with pytest.raises(RuntimeError, match="At least one update must be finite"):
        run(model, clients, tmp_path, troubles=troubles)
    for before, now in zip(start, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, now)


def short_sums(reply):
    values, arrays = from_record(reply.content)
    arrays[1] = arrays[1][:2]
    reply.content = to_record(values, arrays)
    return reply


@pytest.mark.parametrize("trouble", [nan, short_sums])
def test_sums_of_features_that_do_not_fit_do_not_reach_the_scale(trouble, clients, mlp, tmp_path):
    """Sums that are not finite are left out; those of another form end the run."""
    model = frozen(mlp)
    arguments = (model, clients, tmp_path, 1, {(101, FIRST_UPDATE): trouble})
    if trouble is short_sums:
        with pytest.raises(RuntimeError, match="finite sums of the same form"):
            run(*arguments)
        return
    run(*arguments)
    x = np.concatenate([clients[i][0] for i in (0, 2)])
    features = keras.Model(model.inputs, model.get_layer("predictions").input)
    mean = features.predict(x, verbose=0).mean(0)
    scaled = next(w for w in model.weights if w.path.endswith("input_mean")).numpy()
    np.testing.assert_allclose(scaled, mean, atol=1e-4)


def test_a_run_that_was_stopped_continues(clients, mlp, tmp_path):
    whole, again = single(mlp), single(mlp)
    run(whole, clients, tmp_path / "whole", rounds=4)
    troubles = {(100 + i, 4): OSError("the network is down") for i in clients}
    # The nodes know the model: the fifth message is the third update.
    with pytest.raises(RuntimeError, match="network is down"):
        run(single(mlp), clients, tmp_path, rounds=4, troubles=troubles)
    grid = run(again, clients, tmp_path, rounds=4)
    assert len(updates(grid)) == 2 * len(clients)
    for ours, theirs in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    written = json.loads((tmp_path / "output" / "history.json").read_text())
    assert len(written["loss"]) == 4


def test_a_node_refuses_a_model_of_another_version(clients, mlp, tmp_path):
    app = lp.flower_app(single(mlp), lambda context: clients[0], rounds=1)
    grid = Grid(app.client, {100: {}})
    asked = {"version": "0" * 32, "settings": {}}
    model = tmp_path / "model.keras"
    single(mlp).save(model)
    content = np.frombuffer(model.read_bytes(), "uint8")
    for values, arrays, reason in [
        ({"work": "update"}, [], "must have the model of the server"),
        ({"work": "model"}, [content], "must be of the version that it names"),
    ]:
        message = Message(to_record({**asked, **values}, arrays), dst_node_id=100,
                          message_type="train")  # fmt: skip
        (name,) = grid.push_messages([message])
        (reply,) = grid.pull_messages([name])
        assert reason in reply.error.reason
    message = Message(to_record({"work": "hello", "version": "../../x", "settings": {}}, []),
                      dst_node_id=100, message_type="train")  # fmt: skip
    (reply,) = grid.pull_messages(grid.push_messages([message]))
    assert "letters and digits" in reply.error.reason


def test_nodes_need_names_and_data_of_one_form(clients, mlp, tmp_path):
    same = {0: clients[0], 1: clients[1]}
    app = lp.flower_app(single(mlp), lambda context: same[0], rounds=1, output=tmp_path)
    grid = Grid(app.client, {100: {"name": "a"}, 101: {"name": "a"}})
    with pytest.raises(RuntimeError, match=r"name of its own. Received: \['a', 'a'\]"):
        app.server(grid, Context(1, 1, {}, RecordDict(), {}))
    weighted = {0: clients[0], 1: (*clients[1], np.ones(len(clients[1][1]), "float32"))}
    with pytest.raises(RuntimeError, match="one structure, shape and dtype"):
        run(single(mlp), weighted, tmp_path / "b")


def test_wrong_arguments(mlp, tmp_path):
    model = single(mlp)
    with pytest.raises(ValueError, match="`rounds` must be an integer"):
        lp.flower_app(model, print, rounds=0)
    with pytest.raises(TypeError, match="`data` must be a function"):
        lp.flower_app(model, {}, rounds=1)
    with pytest.raises(ValueError, match=r"does not support.*Received: \['compression'\]"):
        lp.flower_app(model, print, rounds=1, compression=lp.Quantize(8))
    with pytest.raises(ValueError, match="`local_epochs` must be"):
        lp.flower_app(model, print, rounds=1, local_epochs=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a package that Flower uses
def test_init_writes_an_app_and_refuses_what_cannot_train(mlp, tmp_path, capsys):
    single(mlp).save(tmp_path / "model.keras")
    folder = tmp_path / "My fleet"
    assert command(["init", str(folder), "--model", str(tmp_path / "model.keras")]) == 0
    assert "edit fleet/data.py" in capsys.readouterr().out
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "certificates.sh", "fleet/__init__.py", "fleet/client_app.py",
        "fleet/data.py", "fleet/server_app.py", "model.keras", "pyproject.toml",
    }  # fmt: skip
    from flwr.cli.build import build_fab_from_disk

    build_fab_from_disk(folder)  # Flower accepts it
    text = tmp_path / "text.keras"
    text.write_text("no model")
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    plain.save(tmp_path / "plain.keras")
    for model, reason in [
        (tmp_path / "absent.keras", "must be a .keras file"),
        (text, "which is damaged"),
        (tmp_path / "plain.keras", "must be compiled"),
    ]:
        with pytest.raises(SystemExit) as ended:
            command(["init", str(tmp_path / "new"), "--model", str(model)])
        assert ended.value.code == 1
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        command(["init", str(folder), "--model", str(tmp_path / "model.keras")])
    assert "must be new" in capsys.readouterr().err


def test_private_rounds_tell_nothing_about_who_took_part(clients, mlp, tmp_path, recwarn):
    """Neither the history nor warnings; and a node that does not clip is clipped."""
    settings = {
        "privacy": lp.DifferentialPrivacy(delta=1e-3, noise_multiplier=1.0, clip=0.1, seed=0),
        "batch_size": None,
    }

    def huge(reply):
        values, arrays = from_record(reply.content)
        arrays[0] = arrays[0] + np.float32(1e6)
        reply.content = to_record(values, arrays)
        return reply

    model = single(mlp)
    start = [weight.numpy() for weight in model.trainable_weights]
    troubles = {(101, FIRST_UPDATE): "silent", (102, FIRST_UPDATE): huge}
    run(model, clients, tmp_path, 1, troubles, deadline=0.3, **settings)
    rng = np.random.default_rng((0, 1, 2))  # the seed, the release, the purpose of noise
    noise = [0.1 * rng.standard_normal(weight.shape) for weight in start]
    sums = [  # of the clipped updates, which count as gradients
        3 * (before - after.numpy()) - one
        for before, after, one in zip(start, model.trainable_weights, noise, strict=True)
    ]
    norm = np.sqrt(sum(np.square(one).sum() for one in sums))
    assert 0.1 < norm < 0.2 + 1e-4  # two updates of at most 0.1
    written = json.loads((tmp_path / "output" / "history.json").read_text())
    assert written["clients"] == [3]
    assert not [one for one in recwarn if "left out" in str(one.message)]
