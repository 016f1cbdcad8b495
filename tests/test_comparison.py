"""The page of `python -m benchmarks`, its verdicts and how it goes on."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lp as lp

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.syspath_prepend(str(FOLDER.parent / "examples"))
        yield


def lib(name):
    return importlib.import_module(f"lib.{name}")


def made(accuracies=None, data_sets=("digits",), **others):
    """Runs of all ways with 20 and 100 examples and three seeds; the accuracy is by way."""
    c, found = lib("ways"), []
    for data in data_sets:
        for way, of in c.WAYS.items():
            for examples in (20, 100):
                if of.rates and examples == 20:
                    continue
                for seed in range(3):
                    run = {
                        "way": way, "data_set": data, "examples": examples, "seed": seed,
                        "accuracy": (accuracies or {}).get((way, examples), 0.5) + seed / 1000,
                        "balanced": 0.5, "auc": 0.75, "tested": 100, "loss": 1.0,
                        "calibration": 0.1, "gap": 0.1, "trained": 100, "cpu": 2.0, "flops": 4e9,
                        "seconds": 2.0, "memory": 10.0, "predicting": 0.1, "bytes": 0,
                        "data": 1000, "file": 2048, "latency": 0.5,
                    }  # fmt: skip
                    if way in (c.EQUAL, c.SKEWED, c.PRIVATE):
                        run |= {"bytes": 3000, "rounds": 2, "by_round": [0.4, run["accuracy"]]}
                    if way == c.SKEWED:
                        run |= {"personal": 0.7 + seed / 1000, "on_clients": 0.6}
                    if way == c.EQUAL:
                        read = {"labels": 1.0, "features": 1.0}, {"labels": 0.0, "features": 0.1}
                        run["read"] = dict(zip(("none", "noise"), read, strict=True))
                    found.append({**run, **others.get(way, {})})
    return found


def judged(runs):
    return {one.claim: one for one in lib("claims").judge(runs)}


def test_verdicts():
    c = lib("ways")
    accuracies = {(c.HEAD, 20): 0.8, (c.SCRATCH, 20): 0.6, (c.DECAY, 100): 0.4, (c.LORA, 100): 0.49}
    others = {c.HEAD: {"cpu": 0.5, "flops": 4e9}, c.LORA: {"trained": 80}}
    found = judged(made(accuracies, **others))
    few = found["Transfer needs little data"]
    assert few.verdict == "holds"
    assert few.figure.startswith("solved head +20.0 ± 0.0 points compared with from scratch, 20")
    assert "(+20.0 at 20, +0.0 at 100 examples)" in few.figure
    plenty = found["Fine-tuning beats a head where data is plenty"]
    assert plenty.verdict == "does not hold"
    more = found["Fine-tuning wants more data than a head"]
    assert more.figure.startswith("its advantage over a solved head grows by +20.0 ± 0.0 points")
    assert more.figure.endswith("it is never higher")
    assert found["Lower rates for lower layers help"].verdict == "does not hold"
    cost = found["Transfer costs little computation: CPU seconds"]
    assert (cost.verdict, cost.figure[:29]) == ("holds", "solved head: 4.0 times fewer ")
    assert found["Transfer costs little computation: floating-point operations"].verdict == (
        "does not hold"
    )
    assert found["LoRA trains a small fraction of the weights"].verdict == "does not hold"
    assert found["LoRA needs few hundred to few thousand examples"].verdict == "holds"
    assert found["A task with few labels profits from another"].verdict == "cannot be told here"
    assert found["One model of two tasks is cheaper than two: the bytes of the file"].figure == (
        "0.50 times the bytes of the file of two models"
    )
    bytes_sent = found["Federated learning saves bandwidth"]
    assert bytes_sent.verdict == "does not hold"
    assert "3.0 times the bytes of the 100 examples, those of one round 1.5" in bytes_sent.figure
    assert "the break-even is at 300 examples" in bytes_sent.figure
    central = found["Federated averaging approaches the centralised model"]
    assert central.verdict == "holds"
    assert central.figure.endswith("the middle and the last round 40.0 %, 50.1 %, 50.1 %")
    personal = found["Each device can have a model for its own data"]
    assert (personal.verdict, personal.figure[:28]) == ("holds", "personal models +10.1 ± 0.1 ")
    assert found["Without differential privacy, updates reveal the data"].verdict == "holds"


def test_the_rates_of_layer_decay_are_averaged():
    c = lib("ways")
    accuracies = {(c.DECAY, 100): 0.6, (f"{c.DECAY}, rate 0.003", 100): 0.9}
    found = judged(made(accuracies))["Lower rates for lower layers help"]
    assert "+16.7 ± 0.0 points compared with one rate" in found.figure
    assert "(+0.0 at 0.0003, +10.0 at 0.001, +40.0 at 0.003)" in found.figure
    assert found.verdict == "holds"


def test_verdicts_over_data_sets():
    settled = lib("differences").settled
    same = np.array([1.0, 1.1, 0.9])
    assert settled({"a": same, "b": same + 0.1, "c": same + 0.2}) == "holds"
    assert settled({"a": -same, "b": -same, "c": -same - 0.1}) == "does not hold"
    wide = np.array([3.0, -3.0, 0.1])
    assert settled({"a": wide, "b": wide, "c": wide}) == "holds"  # of the means
    assert settled({"a": wide, "b": -wide, "c": wide}) == "cannot be told here"
    assert settled({"a": same, "b": -same, "c": wide}) == "holds partly"  # a alone
    many = {str(i): same for i in range(12)}
    assert settled({**many, "d": -0.1 * same}) == "holds partly"
    assert settled({"a": same, "b": same}) == "holds"  # six seeds
    assert settled({"a": same[:2]}) == "cannot be told here"


def test_differences_are_paired():
    d, c = lib("differences"), lib("ways")
    runs = made()
    for run in runs:
        if run["way"] == c.HEAD:
            run["accuracy"] += run["seed"]
    found = d.differences(runs[::-1], c.HEAD, c.SCRATCH, 20, lambda run: run["accuracy"])
    np.testing.assert_allclose(found["digits"], [0, 1, 2])


def results_of(runs):
    return {"runs": runs, "command": "COMMAND", "machine": "MACHINE", "method": "a\n<b>"}


def peer_run(name, **values):
    return {"peer": name, "data_set": "digits", "examples": 100, "seed": 0, **values}


def test_the_page(tmp_path):
    page, c = lib("comparison_page"), lib("ways")
    accuracies = {(c.HEAD, 20): 0.9, (c.SCRATCH, 100): 0.8, (c.TRANSFER, 20): 0.895}
    runs = made(accuracies, **{c.DECAY: {"forgotten": 0.125}, c.HEAD: {"cpu": 3.0}})
    own = {"cpu": 1.0, "seconds": 2.0, "accuracy": 0.5}
    runs.append(peer_run("Keras MultiOptimizer", cpu=3.0, seconds=4.0, accuracy=0.25, own=own))
    runs.append(peer_run("Flower simulation", missing="flwr is not installed"))
    text = page.html_page(results_of(runs), tmp_path)
    assert text.count('<table class="sorts">') == 2
    assert text.count('<figure class="chart">') == 3
    assert (
        "20 labelled examples (digits): solved head has the highest mean accuracy (90.1 %); within "
        "a point: transfer by gradient. Of these, transfer by gradient takes the least time: 2.0"
    ) in text
    assert "a &lt;b&gt;" in text
    assert not re.search(r'<link|<script src=|<img src="http', text)
    assert 'xray.md">' in text
    assert '<td data-value="12.5">+12.5</td>' in text
    plain = page.markdown(results_of(runs))
    lines = [line for line in plain.splitlines() if line.startswith("| solved head")]
    row = "| solved head | 90.1 ± 0.1 | 89.9 to 90.3 | 50.0 | 0.750 | 1.00 | 0.100 | +10.0 | - | "
    assert lines[0] == f"{row}100 | 3.0 | 4.0 | 10 | 0.10 | - | 2 | 0.50 |"
    assert (
        "| Keras MultiOptimizer | fine-tuning, layer decay | 3.00 (3.00 to 3.00) | "
        "2.00 (2.00 to 2.00) | 25.0 | 50.0 |"
    ) in plain
    assert "| Flower simulation | federated, equal parts | flwr is not installed |" in plain
    # "From scratch" reaches 80 % with 100 examples; the head does with 20, LoRA with more.
    needed = next(line for line in plain.splitlines() if line.startswith("| digits | 80.1 |"))
    assert needed.split(" | ")[2:5] == ["100", "20", "20"]
    assert needed.split(" | ")[7] == "more"
    lost = next(line for line in plain.splitlines() if line.startswith("- solved head, compared"))
    assert lost == (
        "- solved head, compared with from scratch: lower in 1 of 2 cases, in points: digits with "
        "100 examples (-30.0)."
    )


def test_what_the_charts_show():
    charts, c = lib("charts"), lib("ways")
    runs = made({(c.HEAD, 20): 0.9})
    spec = json.loads(re.search('json">(.*?)</script>', charts.by_examples(runs, "digits"))[1])
    rows = [row for row in spec["data"]["values"] if row["way"] == c.HEAD]
    assert [row["examples"] for row in rows] == [20, 100]
    assert [rows[0][key] for key in ("low", "accuracy", "high")] == pytest.approx([90, 90.1, 90.2])
    spec = json.loads(re.search('json">(.*?)</script>', charts.by_rounds(runs, "digits"))[1])
    rows = [row for row in spec["data"]["values"] if row["way"] == c.EQUAL]
    assert [row["accuracy"] for row in rows] == pytest.approx([40, 50.1])
    central = [row["accuracy"] for row in spec["data"]["values"] if row["way"] == c.CENTRAL]
    assert central == pytest.approx([50.1, 50.1])  # a line at the same height
    # 95 % interval of three values by hand: t(0.975, 2) = 4.3027.
    assert charts.margin([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, abs=1e-4)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_in_a_browser(browser, tmp_path, width, scheme):
    c = lib("ways")
    path = tmp_path / "report.html"
    runs = made({(c.HEAD, 20): 0.9, (c.SCRATCH, 20): 0.1})
    path.write_text(lib("comparison_page").html_page(results_of(runs), tmp_path))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened, said = context.new_page(), []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: said.append(request.url))
    opened.goto(path.as_uri())
    opened.wait_for_selector("figure.chart svg .mark-line path")
    said.remove(path.as_uri())
    assert said == []  # no error, and nothing is loaded
    assert opened.locator("figure.chart svg").count() == 3
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    # Axes have the colour of the text, which is that of the mode.
    colours = opened.evaluate(
        "['body', 'figure.chart svg text'].map(one => document.querySelector(one))"
        ".map((one, i) => getComputedStyle(one)[i ? 'fill' : 'color'])"
    )
    assert colours == [{"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]] * 2
    opened.locator("summary").first.click()
    heading = opened.locator("table.sorts").first.locator("th").nth(1)
    names = opened.locator("table.sorts").first.locator("tbody td:first-child")
    heading.click()
    assert names.first.inner_text() == c.SCRATCH
    heading.press("Enter")
    assert names.first.inner_text() == c.HEAD
    assert heading.get_attribute("aria-sort") == "descending"
    context.close()


def test_the_committed_page_is_that_of_its_numbers():
    results = json.loads((FOLDER / "results" / "comparison.json").read_text())
    assert (
        lib("comparison_page").markdown(results)
        == (FOLDER / "results" / "comparison.md").read_text()
    )


@pytest.fixture
def called(monkeypatch):
    """What would be trained, instead of training."""
    compare, found = lib("compare"), []
    key = ("way", "data_set", "examples", "seed")
    runs = {run["way"]: {k: v for k, v in run.items() if k not in key} for run in made()}

    def train(self, name, examples):
        found.append((name, examples))
        if len(found) == 5:
            raise KeyboardInterrupt
        return runs[name]

    monkeypatch.setattr(compare.Prepared, "way", train)
    monkeypatch.setattr(compare.Prepared, "peer", lambda *_: {"missing": "it is not installed"})
    monkeypatch.setattr(compare, "one_thread", lambda: None)
    return found


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch, capsys, called):
    compare, c = lib("compare"), lib("ways")
    options = ["--quick", "--out", str(tmp_path)]
    doc = "a\n\nb\n\nmethod"
    with pytest.raises(KeyboardInterrupt):
        compare.compare(doc, options)
    compare.compare(doc, options)
    rates = sum(way.rates for way in c.WAYS.values())
    ways = 2 * (2 * len(c.WAYS) - rates)  # two seeds; the rates with 100 examples only
    assert len(called) == ways + 1
    assert called[4] == called[5]
    compare.compare(doc, options)
    assert len(called) == ways + 1
    results = json.loads((tmp_path / "report.json").read_text())
    assert len([run for run in results["runs"] if "way" in run]) == ways
    assert results["method"] == "method"
    assert (tmp_path / "report.html").exists()
    shown = capsys.readouterr().out
    assert "min left" in shown
    assert "it is not installed" in shown
    assert not list(tmp_path.glob("*.new"))
    monkeypatch.setattr(compare, "digest", lambda *_: "other code")
    compare.compare(doc, [*options, "--seeds", "1", "--only", c.LORA, c.HEAD])
    assert called[-4:] == [(way, n) for n in (20, 100) for way in (c.LORA, c.HEAD)]
    results = json.loads((tmp_path / "report.json").read_text())
    assert len(results["runs"]) == 4  # those of other code are not shown


def test_the_command_goes_on_after_it_was_killed(tmp_path):
    only = ["solved head", "scikit-learn LogisticRegression"]
    options = ["--quick", "--seeds", "1", "--only", *only, "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks", *options]
    pipes = {"cwd": FOLDER.parent, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as first:
        assert first.stdout.readline().startswith("1/3 digits, seed 0, 20 examples, solved head: ")
        first.kill()
    kept = json.loads((tmp_path / "report.quick.json").read_text())["runs"]
    assert len(kept) < 3
    shown = subprocess.run(command, text=True, check=True, **pipes).stdout
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert runs[: len(kept)] == kept  # processor time and all
    assert [run.get("way") or run["peer"] for run in runs] == ["solved head", *only]
    assert all(run["accuracy"] > 0.6 for run in runs)
    assert shown.count("about 0 min left") == 3
    assert shown.endswith(f"Page: {tmp_path / 'report.html'}\n")


def test_what_is_planned(tmp_path, called, capsys, monkeypatch):
    compare, c, peers = lib("compare"), lib("ways"), lib("peers")
    called.extend([None] * 5)
    names = [c.HEAD, c.ONE_TASK, *peers.PEERS]
    options = ["--out", str(tmp_path), "--seeds", "1", "--only", *names]
    compare.compare("a\n\nb\n\nc", options)
    assert "pneumonia_mnist is left out: it needs --mobilenet" in capsys.readouterr().out
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert {run["data_set"] for run in runs} == {
        "digits", "mnist", "fashion_mnist", "cmaterdb/bangla", "trec", "clinc_oos",
    }  # fmt: skip
    assert [run["examples"] for run in runs if run.get("way") == c.HEAD][:2] == [20, 100]
    images = {run["data_set"] for run in runs if run.get("peer") == "AutoKeras, one trial"}
    assert "trec" not in images
    compare.compare("a\n\nb\n\nc", [*options, "--data", "pneumonia_mnist"])
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    xray = [run for run in runs if run["data_set"] == "pneumonia_mnist"]
    assert {run.get("way") for run in xray} == {c.HEAD, None}  # it has one task


def test_the_command_shows_its_options(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    command = importlib.import_module("benchmarks.__main__")
    path = list(sys.path)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    sys.path[:] = path
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m benchmarks --quick" in shown
    assert "--only" in shown


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
    assert measures.training_flops(model, c.TRANSFER, Case) == 10 * 100 + 3 * 50 * 2 * 3 * 2
    assert measures.training_flops(model, c.SCRATCH, Case) == 3 * 50 * 100
    half = 10 * 100 + 3 * 50 * (0.5 * 100 + 0.5 * 12)
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
    for name, peer in peers.PEERS.items():
        run = peers.measure(name, case)
        if "missing" not in run:
            assert run["accuracy"] > (0.2 if peer.package else 0.8), name
            assert run["own"]["accuracy"] > 0.8
