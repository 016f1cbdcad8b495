"""The benchmarks: their library, and the tables of the committed results."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = FOLDER / "results"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__main__")
# The script of each result with a name of its own; the tables of one script need its data sets.
OTHERS = {
    "scripts_transfer": "xray",
    "federated_rounds_flower": "federated_rounds",
    "niid_published": "niid",
    "paradigms_digits": "paradigms",
    "paradigms_fashion_mnist": "paradigms",
}
REPORTED = {path.stem for path in RESULTS.glob("*.json") if not path.stem.endswith(".partial")}
REPORTED -= {"multitask_comparable", "comparison"}  # the last: tests/test_comparison.py


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


def script(name):
    if name.startswith("tflite"):
        pytest.importorskip("ai_edge_litert.interpreter")
    return importlib.import_module(name)


def lib(name):
    return importlib.import_module(f"lib.{name}")


def test_no_file_is_long():
    lengths = {path.name: len(path.read_text().splitlines()) for path in FOLDER.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 250} == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_command_and_the_options(name, monkeypatch, capsys):
    module = script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"python benchmarks/{name}.py" in shown
    assert "--out" in shown


@pytest.mark.parametrize("result", sorted(REPORTED))
def test_the_tables_of_a_result_are_those_of_its_numbers(result):
    numbers = json.loads((RESULTS / f"{result}.json").read_text())
    shown = {"command": "COMMAND", "machine": "MACHINE", "data": result.removeprefix("paradigms_")}
    page = script(OTHERS.get(result, result)).report({**numbers, **shown})
    assert tables(page) == tables((RESULTS / f"{result}.md").read_text())
    assert "\n\n    COMMAND\n\nMachine: MACHINE.\n\n" in page


def tables(text):
    return [line for line in text.splitlines() if line.startswith("|") and "---" not in line]


def test_a_page_has_the_method_but_not_the_question_of_the_docstring():
    doc = "A question?\n\n    python script.py\n\nFirst.\n\n- an item\n"
    page = lib("results").page("Title", "python script.py --seeds 2", "2 cores", doc, "| table |")
    assert page == (
        "# Title\n\n    python script.py --seeds 2\n\nMachine: 2 cores.\n\n"
        "First.\n\n- an item\n\n| table |\n"
    )


def test_a_table_is_markdown():
    text = lib("results").table(["", "a"], [["x", "1"], ["y", "2"]])
    assert text == "|  | a |\n| --- | --- |\n| x | 1 |\n| y | 2 |"


def test_the_command_has_the_names_of_files_without_their_folders(tmp_path):
    arguments = lib("arguments")
    parser = arguments.parser("A question?", seeds=3)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--pictures-in-memory", type=int)
    parser.add_argument("--data", nargs="+")
    words = ["--weights", str(tmp_path / "w.h5"), "--data", "a", "b"]
    given = parser.parse_args(words)
    assert given.out == RESULTS
    names = ("data", "weights", "pictures_in_memory", "seeds")
    found = arguments.command("/folder/x.py", given, *names)
    assert found == "python benchmarks/x.py --data a b --weights w.h5 --seeds 3"


def test_mean_and_sample_deviation():
    scores = lib("scores")
    # Deviations of 2, 4, 9 from their mean of 5: -3, -1, 4; squares 26, divided by 2: 13.
    assert scores.deviation([2, 4, 9]) == pytest.approx(13**0.5)
    assert scores.mean_and_deviation([2, 4, 9], 2) == "5.00 ± 3.61"
    assert scores.mean_and_deviation([0.25], 1) == "0.2 ± 0.0"


def test_a_difference_is_told_from_zero_by_the_interval_of_student():
    verdict = lib("scores").verdict
    # Mean 2, deviation 1, three seeds: 4.303 / sqrt(3) = 2.484 is the half width of the interval.
    assert verdict(np.array([1.0, 2.0, 3.0])) == "not told apart"
    assert verdict(np.array([1.5, 2.5, 3.5])) == "better"  # 2.5 is outside
    assert verdict(np.array([-1.5, -2.5, -3.5])) == "worse"
    assert verdict(np.array([5.0])) == "one seed"


def test_the_rate_is_chosen_with_the_first_seed_alone():
    scores = lib("scores")
    # The third rate would win with seed 1, which does not choose.
    table = {(0, 0.1): 1, (0, 0.2): 3, (0, 0.3): 2, (1, 0.2): 0, (2, 0.2): 5, (1, 0.3): 9}

    def learn(seed, rate):
        return {"seed": seed, "rate": rate, "val": table[seed, rate]}

    runs = scores.sweep(learn, (0.1, 0.2, 0.3), 3, lambda run: run["val"])
    assert [(run["seed"], run["rate"]) for run in runs] == [
        (0, 0.1), (0, 0.2), (0, 0.3), (1, 0.2), (2, 0.2),
    ]  # fmt: skip
    kept = scores.select(runs, chosen=True)
    assert [run["val"] for run in kept] == [3, 0, 5]
    assert scores.chosen([*runs, learn(1, 0.3)], lambda run: run["val"]) == kept


def test_calls_take_turns_and_the_warm_up_does_not_count():
    timing = lib("timing")
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    times = timing.in_turn(calls, rounds=4, warm_up=2)
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(rounds) == 6
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1  # in another order
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_ratio_compares_the_rounds_one_by_one():
    # Ratios of the rounds: 1, 2, 3, 4, 5; the medians of both lists would give 30 / 12 = 2.5.
    found = lib("timing").ratio([10, 24, 30, 60, 60], [10, 12, 10, 15, 12])
    assert found == (3, 2, 4)


def test_seconds_are_those_of_the_clock_and_of_the_processor(monkeypatch):
    timing = lib("timing")
    clock, processor = iter([1.0, 4.0]), iter([10.0, 12.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(processor))
    assert timing.seconds(lambda: None) == (3.0, 2.0)


@pytest.mark.parametrize("settings", [None, {"steps": 3}])
def test_a_journal_continues(tmp_path, settings):
    journal, path = lib("journal"), tmp_path / "folder" / "x.partial.json"
    first = journal.Journal(path, settings)
    assert first.run(lambda: {"score": 1}, way="a", seed=0) == {"way": "a", "seed": 0, "score": 1}
    again = journal.Journal(path, settings)
    assert again.run(lambda: pytest.fail("learned twice"), way="a", seed=0)["score"] == 1
    assert again.run(lambda: {"score": 2}, way="a", seed=1)["score"] == 2
    kept = json.loads(path.read_text())
    runs = kept if settings is None else kept["runs"]
    assert [run["score"] for run in runs] == [1, 2]
    if settings:  # runs of other settings are not continued
        assert journal.Journal(path, {"steps": 4}).runs == []


def test_a_draw_keeps_the_shares_of_the_classes():
    x, y = np.arange(40), np.repeat([0, 1], [30, 10])
    (drawn, labels), (rest, _) = lib("problems").draw((x, y), 8, seed=0)
    assert np.bincount(labels).tolist() == [6, 2]
    assert sorted([*drawn, *rest]) == x.tolist()
    assert np.array_equal(y[drawn], labels)


def test_the_batches_of_tasks_have_as_many_labels_of_each():
    multitask = lib("multitask")
    labels = {"a": np.array([0, 1, -1, -1, -1]), "b": np.array([-1, -1, 0, 1, 2])}
    part = np.zeros((5, 1)), labels
    problem = multitask.Problem("two", {"a": 2, "b": 3}, None, part, part, part)
    stream = multitask.batches(problem, ["a", "b"], 2, seed=0)
    for _ in range(3):
        batch = next(stream)
        assert len(batch) == 4
        assert (batch < 2).sum() == 2
    both = {"a": np.arange(5), "b": np.arange(5)}
    problem.train = np.zeros((5, 1)), both
    assert len(next(multitask.batches(problem, ["a", "b"], 2, seed=0))) == 2


def test_a_restarted_model_is_traced_once_and_learns_from_its_seed():
    keras = importlib.import_module("keras")
    built = []

    def build():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.Adam(0.1), "mse")
        built.append(model)
        return model

    restart = lib("multitask").Restarted(build, steps=1)
    x, y = np.eye(2), np.ones(2)
    found = []
    for seed in (0, 1, 0):
        model = restart(seed)
        model.fit(x, y, epochs=2, verbose=0, shuffle=False)
        found.append(model.get_weights()[0])
    assert model is built[0]
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def test_the_published_network_of_two_tasks_and_its_labels(monkeypatch):
    module = script("multitask_published")
    # 3x3 convolutions of 1-96, 96-96 twice, 96-192, 192-192 three times, and a 1x1 of 192-192.
    weights = 960 + 2 * 83_040 + 166_080 + 3 * 331_968 + 37_056
    assert module.network().count_params() == weights
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 28, 28, 1), dtype="uint8")
    parts = {"mnist": (images[0], np.arange(8)), "fashion_mnist": (images[1], np.arange(8)[::-1])}
    x, labels = module.pooled(parts)
    np.testing.assert_array_equal(x[8:], images[1])
    np.testing.assert_array_equal(labels["mnist"], [*range(8), *[-1] * 8])
    np.testing.assert_array_equal(labels["fashion_mnist"], [*[-1] * 8, *range(7, -1, -1)])
    monkeypatch.setattr(module, "EPOCHS", 2)
    monkeypatch.setattr(module.lp, "load_dataset", lambda task, **_: parts[task])
    runs = [{"name": name, "seed": 0, **module.learn(name, 0)} for name in ("mnist", "both")]
    assert set(runs[1]) == {
        "name", "seed", "mnist", "fashion_mnist", "mnist afterwards", "fashion_mnist afterwards",
    }  # fmt: skip
    page = module.report({"runs": runs, "command": "COMMAND", "machine": "MACHINE"})
    assert page.splitlines()[-1].endswith("| 94.32 | 95.18 |")
    assert "| fashion_mnist | - |" in page


def test_the_published_setting_of_niid(monkeypatch, tmp_path):
    module, asked = script("niid"), []

    def accuracy(data, skew, proximal, seed, given):
        asked.append((data, skew, given.rounds, given.epochs))
        return 50.0

    monkeypatch.setattr(module, "accuracy", accuracy)
    words = ["niid.py", "--published", "--skews", "two labels", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "1", "--data", "mnist"])
    module.main()
    assert asked == [("mnist", "two labels", 50, 10)] * 2
    page = (tmp_path / "niid_published.md").read_text()
    assert "| mnist | two labels | FedAvg | 50.00 ± 0.00 | 96.86 |" in page
    assert "niid.py --data mnist --skews 'two labels' --proximal 0.01 --seeds 1 --published" in page
    monkeypatch.setattr(sys, "argv", [*words, "--rounds", "5"])
    with pytest.raises(SystemExit):
        module.main()


def test_the_documentation_has_one_form_for_each_script():
    text = (FOLDER.parent / "docs" / "benchmarks.md").read_text()
    labels = ["Question", "Data", "Settings", "Command", "Result", "Does not show", "All figures"]
    sections = text.split("\n## ")[1:]
    for section in sections:
        assert re.findall(r"^\*\*([A-Z][a-z ]+)\.\*\*", section, re.MULTILINE) == labels, section
    for name in SCRIPTS:
        assert f"benchmarks/{name}.py" in text, name
    linked = set(re.findall(r"\(../benchmarks/results/(\w+)\.md\)", text))
    assert linked == {path.stem for path in RESULTS.glob("*.md")}


def test_runs_of_other_settings_are_kept_under_another_name(tmp_path, capsys):
    journal = lib("journal").Journal
    path = tmp_path / "runs.json"
    journal(path, {"steps": 1}).run(lambda: {"value": 3}, seed=0)
    assert journal(path, {"steps": 1}).has(seed=0)
    other = journal(path, {"steps": 2})
    assert not other.has(seed=0)
    old = tmp_path / "runs.old.json"
    assert json.loads(old.read_text())["runs"] == [{"seed": 0, "value": 3}]
    assert f"the runs so far are kept in {old}" in capsys.readouterr().out
