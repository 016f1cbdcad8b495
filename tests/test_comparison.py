"""The page of `python -m benchmarks`, its verdicts and how it goes on."""

import importlib
import json
import re
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


def made(accuracies, **others):
    """Runs of all ways with 20 and 100 examples and three seeds; the accuracy is by way."""
    c, found = lib("comparison"), []
    for way in c.WAYS:
        for examples in (20, 100):
            for seed in range(3):
                run = {
                    "way": way, "data_set": "digits", "examples": examples, "seed": seed,
                    "accuracy": accuracies.get((way, examples), 0.5) + seed / 1000,
                    "tested": 100, "loss": 1.0, "calibration": 0.1, "gap": 0.1, "trained": 100,
                    "cpu": 2.0, "seconds": 2.0, "predicting": 0.1, "bytes": 0, "data": 1000,
                    "file": 2048,
                }  # fmt: skip
                found.append({**run, **others.get(way, {})})
    return found


def test_verdicts():
    c, claims = lib("comparison"), lib("claims")
    accuracies = {(c.HEAD, 20): 0.8, (c.SCRATCH, 20): 0.6, (c.DECAY, 100): 0.4}
    others = {c.HEAD: {"cpu": 0.5}, c.LORA: {"trained": 80}, c.EQUAL: {"bytes": 3000}}
    found = {one.claim: one for one in claims.judge(made(accuracies, **others))}
    few = found["Transfer needs little data"]
    assert few.verdict == "holds"
    assert few.figure.startswith("solved head +20.0 ± 0.0 points compared with from scratch, 20")
    assert found["With more data, fine-tuning is better than a head alone"].verdict == (
        "does not hold"
    )
    assert found["Lower rates for lower layers help"].verdict == "cannot be told here"
    cost = found["Transfer costs little computation"]
    assert (cost.verdict, cost.figure[:29]) == ("holds", "solved head: 4.0 times fewer ")
    assert found["LoRA trains a small fraction of the weights"].verdict == "does not hold"
    assert found["Federated learning saves bandwidth"].verdict == "does not hold"
    assert "3.0 times the bytes of the 100 examples" in (
        found["Federated learning saves bandwidth"].figure
    )
    assert found["Federated averaging approaches the centralised model"].verdict == "holds"


def test_differences_are_paired():
    claims, c = lib("claims"), lib("comparison")
    runs = made({})
    for run in runs:
        if run["way"] == c.HEAD:
            run["accuracy"] += run["seed"]
    found = claims.differences(runs[::-1], c.HEAD, c.SCRATCH, 20, lambda run: run["accuracy"])
    np.testing.assert_allclose(sorted(found), [0, 1, 2])


def test_the_page():
    page, c = lib("comparison_page"), lib("comparison")
    runs = made({(c.HEAD, 20): 0.9}, **{c.DECAY: {"forgotten": 0.125}})
    results = {"runs": runs, "command": "COMMAND", "machine": "MACHINE", "method": "a\n<b>"}
    text = page.html_page(results)
    assert text.count('<table class="sorts">') == 2
    assert text.count("<svg") == 1
    assert text.count("<polyline") == 6
    assert "digits, 20 labelled examples: solved head has the highest mean (90.1 ± 0.1 %)" in text
    assert "a &lt;b&gt;" in text
    assert not re.search(r"https?:|<link|src=", text)
    assert '<td data-value="12.5">+12.5</td>' in text
    plain = page.markdown(results)
    lines = [line for line in plain.splitlines() if line.startswith("| solved head")]
    assert lines[0].startswith("| solved head | 90.1 ± 0.1 | 1.00 | 0.100 | +10.0 | 100 | 2.0 |")
    assert lines[0].endswith("| 0.10 | - | - | 2 |")


def test_the_committed_page_is_that_of_its_numbers():
    results = json.loads((FOLDER / "results" / "comparison.json").read_text())
    assert (
        lib("comparison_page").markdown(results)
        == (FOLDER / "results" / "comparison.md").read_text()
    )
    assert len(results["runs"]) == 4 * 3 * len(lib("comparison").WAYS)


def test_a_stopped_comparison_goes_on(tmp_path, monkeypatch, capsys):
    compare, c = lib("compare"), lib("comparison")
    called = []

    def learned(prepared, way, examples):
        called.append((way, examples))
        if len(called) == 5:
            raise KeyboardInterrupt
        return {
            key: value
            for key, value in made({})[0].items()
            if key not in ("way", "data_set", "examples", "seed")
        }

    monkeypatch.setattr(compare, "learned", learned)
    options = ["--quick", "--out", str(tmp_path)]
    doc = "a\n\nb\n\nmethod"
    with pytest.raises(KeyboardInterrupt):
        compare.compare(doc, options)
    compare.compare(doc, options)
    ways = len(c.WAYS)
    assert len(called) == 2 * 2 * ways + 1
    assert called[4] == called[5]
    compare.compare(doc, options)
    assert len(called) == 2 * 2 * ways + 1
    results = json.loads((tmp_path / "report.json").read_text())
    assert len(results["runs"]) == 2 * 2 * ways
    assert results["method"] == "method"
    assert (tmp_path / "report.html").exists()
    assert "min left" in capsys.readouterr().out
    monkeypatch.setattr(compare, "FULL", {**compare.FULL, "examples": [20], "seeds": 1})
    compare.compare(doc, options[1:])
    assert len(called) == 2 * 2 * ways + 1 + ways
    compare.compare(doc, options)  # the quick runs are still there
    assert len(called) == 2 * 2 * ways + 1 + ways
    monkeypatch.setattr(compare, "digest", lambda: "other code")
    compare.compare(doc, [*options, "--seeds", "1", "--only", c.LORA, c.HEAD])
    assert called[-4:] == [(way, n) for n in (20, 100) for way in (c.LORA, c.HEAD)]


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


@pytest.mark.slow
def test_a_way_is_measured(tmp_path):
    compare, c = lib("compare"), lib("comparison")
    settings = {"examples": [20], "pretraining": 2000}
    prepared = compare.prepare("digits", 0, None, settings, str(tmp_path))
    for way in (c.HEAD, c.LORA, c.EQUAL):
        run = compare.learned(lambda: prepared, way, 20)
        assert 0.2 <= run["accuracy"] <= 1
        assert ("forgotten" in run) == (way == c.LORA)
        assert (run["bytes"] > 0) == (way == c.EQUAL)
        assert run["file"] > 10_000
