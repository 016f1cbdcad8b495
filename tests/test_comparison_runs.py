"""What `python -m benchmarks` runs: cases, ways, peers, and what is measured of them."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_lp as lp
from tests.test_comparison import _on_path, lib

__all__ = ["_on_path"]  # the fixture that finds `lib`


@pytest.mark.parametrize("settings", ["QUICK", "FULL"])
def test_all_ways_have_as_many_steps(monkeypatch, settings):
    """Steps are counted by what `fit` is given; nothing is trained."""
    compare, w, recipes = lib("compare"), lib("ways"), lib("recipes")
    found = []

    def fit(model, x, y=None, batch_size=None, epochs=1, **_):
        count = len(list(x.unbatch())) if y is None else len(x)
        found.append(epochs * count / (batch_size or w.BATCH))

    monkeypatch.setattr(lp.Model, "fit", fit)
    monkeypatch.setattr(keras.Model, "fit", fit)
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="block1")])

    def build(task, builder=lp.transfer_model, **options):
        return builder(keras.models.clone_model(network), task, **options)

    def untrained(task):
        return build(task, pretrained=False, trainable="all")

    pool = np.zeros((1000, 2), "float32"), np.arange(1000) % 2
    case = lib("cases").Case(
        ["a", "b"], None, None, pool, np.arange(1000) % 3, build, untrained, None,
        seen=getattr(compare, settings).seen, seed=0,
    )  # fmt: skip
    for examples in getattr(compare, settings).examples:
        few = case.first(examples)
        ways = [way for name, way in w.WAYS.items() if name != w.HEAD and "federated" not in name]
        peers = recipes.keras_guide, recipes.multi_optimizer, recipes.fastai, recipes.two_outputs
        for learn in (*(way.learn for way in ways), *peers):
            found.clear()
            learn(few)
            assert sum(found) == few.seen / w.BATCH
        clients = w.clients_of(few)
        steps = w.rounds_of(clients, few) * sum(len(y) for _, y in clients.values()) / w.BATCH
        assert steps == few.seen / w.BATCH


def test_the_cycle_of_fastai():
    cycle = lib("recipes").one_cycle(1.0, steps=100, rising=0.3, start=5)
    values = [float(cycle(step)) for step in (0, 15, 30, 65, 100)]
    np.testing.assert_allclose(values, [0.2, 0.6, 1.0, 0.5, 0.0], atol=1e-6)


def test_rates_of_blocks():
    recipes = lib("recipes")
    layers = [keras.layers.Dense(2, name=f"block{i}") for i in range(3)]
    below = keras.Sequential([keras.Input((2,)), *layers])
    model = recipes.with_heads(below, {"head": 2})
    optimizer = recipes.block_rates(model, lambda blocks: [0.1 * i for i in range(blocks + 1)])
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    rates = {
        v.path: round(float(one.learning_rate), 3)
        for one in optimizer.optimizers
        for v in one._trainable_variables
    }
    assert sorted(rates.values()) == [0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert {rate for path, rate in rates.items() if "head" in path} == {0.3}


def test_the_test_examples_of_a_client():
    x, y = lib("measures").own_test(np.array([1, 1]), (np.arange(6), np.array([0, 1, 2, 1, 1, 0])))
    np.testing.assert_array_equal(x, [1, 3, 4])
    np.testing.assert_array_equal(y, [1, 1, 1])


def test_a_case(tmp_path, monkeypatch):
    cases = lib("cases")
    monkeypatch.setattr(cases.quickstart, "pretrain", lambda p, path, *_: path.touch())
    case = cases.make("digits", 1, cases.Files(), 100, 1000, 2000, tmp_path)
    assert case.names == ["5", "6", "7", "8", "9"]
    assert len(case.train[1]) == cases.OTHER_LABELS
    np.testing.assert_array_equal(case.second, (case.train[1] + 5) % 2)
    few = case.first(20)
    np.testing.assert_array_equal(few.train[0], case.pool[0][:20])
    assert few.pool is case.pool
    assert case.source[0][1].max() == 4
    assert [path.name for path in tmp_path.iterdir()] == ["for_digits.keras"]
    with pytest.raises(SystemExit, match="cifar10_subset needs --mobilenet and --cifar10"):
        cases.make("cifar10_subset", 0, cases.Files(), 100, 1000, 2000, tmp_path)


def test_operations_are_counted():
    forward = lib("cost").forward_flops
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    assert forward(dense) == 2 * 4 * 3 + 3
    layers = [keras.Input((8, 8, 2)), keras.layers.Conv2D(5, 3, padding="valid")]
    assert forward(keras.Sequential(layers)) == 6 * 6 * 5 * (2 * 3 * 3 * 2) + 6 * 6 * 5


def test_operations_of_a_training(monkeypatch):
    c, measures = lib("ways"), lib("measures")
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = lp.transfer_model(backbone, 2)
    monkeypatch.setattr(measures, "forward_flops", lambda model: 100)

    class Case:
        train = np.zeros((10, 4)), np.zeros(10)
        seen = 50

    assert measures.training_flops(model, c.HEAD, Case) == 10 * 100
    once = 10 * 40 * 100  # the ten examples are repeated 40 times
    assert measures.training_flops(model, c.TRANSFER, Case) == once + 3 * 50 * 2 * 3 * 2
    assert measures.training_flops(model, c.SCRATCH, Case) == 3 * 50 * 100
    half = once + 3 * 50 * (0.5 * 100 + 0.5 * 12)
    assert measures.training_flops(model, c.DECAY, Case) == half


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_memory_and_processor_time_of_a_run():
    cost = lib("cost")
    with cost.peak_memory() as found:
        big = np.ones(2**24)  # 128 MiB
        del big
    assert 120 < found["MiB"] < 200
    before = cost.processor_seconds()
    work = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", work], **pipes) as child:
        child.stdout.readline()
        assert 0.45 < cost.processor_seconds() - before < 2  # of a child that lives
        child.communicate(b"\n")
    assert 0.45 < cost.processor_seconds() - before < 2  # of one that ended


def test_a_peer_that_is_not_installed(monkeypatch):
    peers = lib("peers")
    monkeypatch.setitem(peers.PEERS, "nobody", peers.Peer("way", None, "no_such_package"))
    assert peers.measure("nobody", None) == {"missing": "no_such_package is not installed"}


def test_a_peer_that_does_not_work(monkeypatch):
    peers = lib("peers")

    class Case:
        seed, test = 1, ([], [])

    def fail(case):
        raise ValueError("no such layer\nmore")

    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer("way", fail, "numpy"))
    assert peers.measure("broken", Case) == {"missing": "numpy fails: no such layer"}
    monkeypatch.setitem(peers.PEERS, "silent", peers.Peer("way", lambda _: 1 / 0, "numpy"))
    assert peers.measure("silent", Case) == {"missing": "numpy fails: division by zero"}
    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer("way", fail))
    with pytest.raises(ValueError, match="no such layer"):
        peers.measure("broken", Case)


@pytest.mark.slow
def test_ways_and_peers_are_measured(tmp_path):
    cases, c, peers, measures = map(lib, ("cases", "ways", "peers", "measures"))
    case = cases.make("digits", 0, cases.Files(), 100, 5000, 2000, tmp_path).first(100)
    source = measures.source_head(case)
    for way in c.WAYS:
        run = measures.measure(way, case, source)
        assert run["accuracy"] > (0.3 if way == c.PRIVATE else 0.8), way
        assert ("forgotten" in run) == (c.WAYS[way].backbone > 0 and way != c.SCRATCH)
        assert (run["bytes"] > 0) == (way in (c.EQUAL, c.SKEWED, c.PRIVATE))
        assert run["file"] > 10_000
        if "by_round" in run:
            assert run["by_round"][-1] == pytest.approx(run["accuracy"], abs=0.006)
    for name in peers.PEERS:
        run = peers.measure(name, case)
        if "missing" not in run:
            assert run["accuracy"] > 0.8, name
            assert run["own"]["accuracy"] > 0.8
