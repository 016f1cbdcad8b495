"""The page of `python -m benchmarks`, its verdicts and how it goes on."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    others = {c.HEAD: {"cpu": 0.5}, c.TRANSFER: {"flops": 3e9}, c.LORA: {"trained": 80}}
    found = judged(made(accuracies, **others))
    few = found["Transfer needs little data"]
    assert few.verdict == "holds"
    assert few.figure == (
        "solved head +20.0 ± 0.0 points compared with from scratch, 20 examples; by examples: "
        "+20.0 at 20, +0.0 at 100"
    )
    plenty = found["Fine-tuning beats a head where data is plenty"]
    assert plenty.verdict == "does not hold"
    more = found["Fine-tuning wants more data than a head"]
    assert "from 20 to 100 examples: +20.0 ± 0.0 points; it is never higher" in more.figure
    assert more.verdict == "holds"
    assert found["Lower rates for lower layers help"].verdict == "does not hold"
    cost = found["Transfer costs less than half of fine-tuning: CPU seconds"]
    assert (cost.verdict, cost.figure[:29]) == ("holds", "solved head: 4.0 times fewer ")
    operations = found["Transfer costs less than half of fine-tuning: floating-point operations"]
    assert operations.verdict == "does not hold"
    assert operations.figure.startswith("transfer by gradient: 1.3 times fewer")
    assert found["LoRA trains less than half of the weights"].verdict == "does not hold"
    assert found["LoRA is within two points of all weights"].verdict == "holds"
    assert found["A task with few labels profits from another"].verdict == "cannot be told here"
    assert found["One model of two tasks is cheaper than two: the bytes of the file"].figure == (
        "0.50 times the bytes of the file of two models"
    )
    bytes_sent = found["Federated learning saves bandwidth"]
    assert bytes_sent.verdict == "does not hold"
    assert "3.0 times the bytes of the 100 examples, those of one round 1.5" in bytes_sent.figure
    assert "the break-even is at 300 examples" in bytes_sent.figure
    central = found["Federated averaging comes within two points of one place"]
    assert central.verdict == "holds"
    assert central.figure.endswith("the middle and the last round 40.0 %, 50.1 %, 50.1 %")
    personal = found["Each device can have a better model for its own data"]
    assert (personal.verdict, personal.figure[:28]) == ("holds", "personal models +10.1 ± 0.1 ")
    assert found["Without differential privacy, updates reveal the data"].verdict == "holds"


def test_overfitting_is_judged_by_the_gap():
    c = lib("ways")
    runs = made()
    for run in runs:
        if run["way"] == c.ONE_RATE:
            run["gap"] = 0.3 + run["seed"] / 100 if run["examples"] == 20 else 0.1
    found = judged(runs)["Fine-tuning overfits when data is scarce"]
    assert found.verdict == "holds"
    assert found.figure.endswith("100: +21.0 ± 1.0 points; of a solved head +0.0 ± 0.0 points")


@pytest.mark.parametrize(("lora", "said"), [(0.47, "does not hold"), (0.9, "holds")])
def test_lora_may_be_better_than_all_weights(lora, said):
    found = judged(made({(lib("ways").LORA, 100): lora}))
    assert found["LoRA is within two points of all weights"].verdict == said


def test_the_rates_of_layer_decay_are_averaged():
    c = lib("ways")
    accuracies = {(c.DECAY, 100): 0.6, (c.at_rate(c.DECAY, 0.003), 100): 0.9}
    found = judged(made(accuracies))["Lower rates for lower layers help"]
    assert "+16.7 ± 0.0 points compared with one rate" in found.figure
    assert "(+0.0 at 0.0003, +10.0 at 0.001, +40.0 at 0.003)" in found.figure
    assert found.verdict == "holds"


def by_data(**values):
    return {data: dict(enumerate(of)) for data, of in values.items()}


def test_verdicts_over_data_sets():
    settled = lib("differences").settled
    same = np.array([1.0, 1.1, 0.9])
    assert settled(by_data(a=same, b=same + 0.1, c=same + 0.2)) == "holds"
    assert settled(by_data(a=-same, b=-same, c=-same - 0.1)) == "does not hold"
    assert settled(by_data(a=same, b=-same, c=same)) == "cannot be told here"
    many = dict.fromkeys("abcdefghijkl", same)
    assert settled(by_data(**many, m=-0.1 * same)) == "holds partly"
    assert settled(by_data(a=same, b=same)) == "holds"  # six seeds
    assert settled(by_data(a=same[:2])) == "cannot be told here"


def test_differences_are_paired_by_seed():
    d, c = lib("differences"), lib("ways")
    runs = [run for run in made() if (run["way"], run["seed"]) != (c.SCRATCH, 1)]
    for run in runs:
        if run["way"] == c.HEAD:
            run["accuracy"] += run["seed"]
    found = d.differences(runs[::-1], c.HEAD, c.SCRATCH, 20)
    assert found == {"digits": {0: pytest.approx(0), 2: pytest.approx(200)}}


def test_some_seeds_or_data_sets_may_be_missing():
    c, summaries = lib("ways"), lib("summaries")
    runs = made(data_sets=("digits", "trec", "mnist"))
    del runs[5::7]
    runs = [run for run in runs if (run["way"], run["data_set"]) != (c.MULTITASK, "trec")]
    assert len(judged(runs)) == 17
    means = lib("differences").together({1: by_data(a=[1], b=[5]), 2: by_data(a=[2]), 3: {}})
    assert means == {1: {"a": {0: 1}}, 2: {"a": {0: 2}}}  # of the data sets that both have
    assert "20 labelled examples (2 data sets)" in summaries.advice(runs)
    for some in ([], runs[:1], [run for run in runs if run["way"] == c.HEAD]):
        text = lib("comparison_page").markdown(results_of(some))
        assert text.startswith("# The paradigms compared")
    assert lib("comparison_page").html_page(results_of(runs[:1])).count("<table") >= 1


def results_of(runs):
    return {"runs": runs, "command": "COMMAND", "machine": "MACHINE", "method": "a\n<b>"}


def peer_run(name, **values):
    return {"peer": name, "data_set": "digits", "examples": 100, "seed": 0, **values}


def test_the_page(tmp_path):
    page, c = lib("comparison_page"), lib("ways")
    accuracies = {(c.HEAD, 20): 0.9, (c.SCRATCH, 100): 0.8, (c.TRANSFER, 20): 0.895}
    others = {c.DECAY: {"forgotten": 0.125}, c.HEAD: {"cpu": 3.0}, c.SCRATCH: {"gap": 0.05}}
    runs = made(accuracies, **others)
    own = {"cpu": 1.0, "seconds": 2.0, "accuracy": 0.5}
    runs.append(peer_run("Keras MultiOptimizer", cpu=3.0, seconds=4.0, accuracy=0.25, own=own))
    runs.append(peer_run("Flower simulation", missing="flwr is not installed"))
    text = page.html_page(results_of(runs), tmp_path)
    assert text.count('<table class="sorts">') == 2
    assert text.count('<figure class="chart">') == 3
    assert (
        "20 labelled examples (digits): solved head has the highest mean accuracy, 90.1 %; within "
        "a point: transfer by gradient. The cheapest of these is transfer by gradient, 2.0 CPU sec"
    ) in text
    assert "a &lt;b&gt;" in text
    assert not re.search(r'<link|<script src=|<img src="http', text)
    assert 'xray.md">ImageNet to chest X-rays</a> (2 cores of AMD EPYC, 0 GPU)' in text
    assert '<td data-value="12.5">+12.5</td>' in text
    plain = page.markdown(results_of(runs))
    lines = [line for line in plain.splitlines() if line.startswith("| solved head")]
    row = "| solved head | 90.1 ± 0.1 | 89.9 to 90.3 | 50.0 | 0.750 | 1.00 | 0.100 | +10.0 | - | "
    assert lines[0] == f"{row}100 | 3.0 | 4.0 | 10 | 0.10 | - | 2 | 0.50 |"
    assert (
        "| Keras MultiOptimizer | fine-tuning (layer decay) | 3.00 (3.00 to 3.00) | "
        "2.00 (2.00 to 2.00) | 25.0 | 50.0 | -25.0 to -25.0 | 1 |"
    ) in plain
    assert "| Flower simulation | federated (equal parts) | flwr is not installed |" in plain
    assert "| digits | 80.1 |" not in plain  # "from scratch" has not learned
    for run in runs:
        if run.get("way") == c.SCRATCH:
            run["gap"] = 0.15
    plain = page.markdown(results_of(runs))
    # "From scratch" reaches 80 % with 100 examples; the head does with 20, LoRA with more.
    needed = next(line for line in plain.splitlines() if line.startswith("| digits | 80.1 |"))
    assert needed.split(" | ")[2:5] == ["100", "20", "20"]
    assert needed.split(" | ")[7] == "more"
    lost = next(line for line in plain.splitlines() if line.startswith("- solved head, compared"))
    assert lost == (
        "- solved head, compared with from scratch: lower in 1 of 2 cases, in points: digits with "
        "100 examples (-30.0)."
    )


def test_the_winner_on_each_data_set():
    found = {"a": by_data(x=[1], y=[3, 5], z=[0]), "b": by_data(x=[2], y=[3, 4], w=[1])}
    said = lib("summaries").winners(found)
    assert said == " The highest on each data set: b on x, w; a on y, z."
    assert lib("summaries").winners({"a": by_data(x=[1])}) == ""


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
    assert lib("scores").margin([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, abs=1e-4)


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

    def train(name, examples, *_):
        found.append((name, examples))
        if len(found) == 5:
            raise KeyboardInterrupt
        return runs[name]

    monkeypatch.setattr(compare, "run_way", train)
    monkeypatch.setattr(compare, "run_peer", lambda *_: {"missing": "it is not installed"})
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
    for run, old in zip(runs, kept, strict=False):
        assert {**run, "code": old["code"]} == old  # processor time and all
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
    assert not any("code" in run for run in runs)
    images = {run["data_set"] for run in runs if run.get("peer") == "AutoKeras with one trial"}
    assert "trec" not in images
    compare.compare("a\n\nb\n\nc", [*options, "--data", "pneumonia_mnist"])
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    xray = [run for run in runs if run["data_set"] == "pneumonia_mnist"]
    assert {run.get("way") for run in xray} == {c.HEAD, None}  # it has one task
    with pytest.raises(SystemExit, match="None of one task can run on pneumonia_mnist"):
        compare.compare(
            "a\n\nb\n\nc", [*options[:4], "--data", "pneumonia_mnist", "--only", c.ONE_TASK]
        )


def test_one_case_is_made_once_and_one_is_kept(monkeypatch):
    compare, asked = lib("compare"), []

    class Case:
        def first(self, count):
            return count

    monkeypatch.setattr(compare.cases, "make", lambda data, *_: asked.append(data) or Case())
    monkeypatch.setattr(compare.measures, "source_head", lambda case: None)
    monkeypatch.setattr(compare.measures, "measure", lambda *found: found)
    compare.prepared.cache_clear()
    compare.source.cache_clear()
    for data in ("a", "a", "b", "a"):
        made = data, 0, compare.QUICK, compare.cases.Files(), Path("folder")
        assert compare.run_way("LoRA", 20, *made) == ("LoRA", 20, None)
    assert asked == ["a", "b", "a"]
    compare.prepared.cache_clear()
    compare.source.cache_clear()


def test_the_command_of_the_page():
    command = lib("compare").command
    options = {"quick": True, "data": ["digits"], "mobilenet": Path("/a/m.h5"), "only": None}
    assert command(options) == "python -m benchmarks --quick --data digits --mobilenet m.h5"
    assert command({"only": ["LoRA", "solved head"], "quick": False, "seeds": 2}) == (
        "python -m benchmarks --only LoRA 'solved head' --seeds 2"
    )


def test_what_changes_a_digest(tmp_path, monkeypatch):
    compare = lib("compare")
    for path in ("benchmarks/lib", "examples", "keras_lp"):
        shutil.copytree(FOLDER.parent / path, tmp_path / path)
    monkeypatch.setattr(compare, "FOLDER", tmp_path / "benchmarks")
    before = compare.code()

    def changed(file):
        path = tmp_path / file
        text = path.read_text()
        path.write_text(text + "# more")
        after = compare.code()
        path.write_text(text)
        return {kind for kind, value in after.items() if value != before[kind]}

    assert changed("keras_lp/model/model.py") == {"networks", "way", "peer"}
    assert changed("examples/quickstart.py") == {"networks", "way", "peer"}
    assert changed("benchmarks/lib/measures.py") == {"way", "peer"}
    assert changed("benchmarks/lib/recipes.py") == {"peer"}
    assert changed("benchmarks/lib/charts.py") == set()


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
