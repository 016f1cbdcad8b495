"""What the README shows and `make demo` runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_lp.federated.engine import installation

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def run(*command, folder):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def accuracies(table):
    """The first percentage of each line that starts with a paradigm's name."""
    rows = re.findall(r"^(from scratch|transfer|fine-tuning|multitask|federated)\D.*?([\d.]+)%",
                      table, re.MULTILINE)  # fmt: skip
    return {name: float(value) for name, value in rows}


def test_transfer_beats_from_scratch_on_the_quickstart(tmp_path):
    printed = run(ROOT / "examples" / "quickstart.py", folder=tmp_path)
    measured = accuracies(printed)
    assert len(measured) == 5
    assert measured["transfer"] > measured["from scratch"]
    assert measured["fine-tuning"] > measured["from scratch"]
    files = {path.name for path in (tmp_path / "runs" / "quickstart").iterdir()}
    assert files == {"pretrained.keras", "digits.tflite", "quickstart.png"}
    on_phone = float(re.search(r"accuracy in LiteRT ([\d.]+)%", printed).group(1))
    assert on_phone == measured["fine-tuning"]


@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/guide.md", 14)])
def test_the_examples_of_the_pages_run_and_print_what_is_shown(page, count, tmp_path):
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    offline = [block for block in blocks if "needs a network" not in block]
    assert len(offline) == count
    (tmp_path / "page.py").write_text("\n".join(offline))
    printed = run("page.py", folder=tmp_path)
    assert "digits.tflite: " in printed
    assert shown_figures(text)
    pairs = zip(shown_figures(text), shown_figures(printed), strict=False)
    for told, measured in pairs:  # the same, as far as processors agree
        assert measured == pytest.approx(told, rel=0.3)


def shown_figures(text):
    """The error of cross-validation and the accuracy of a head; the accuracy of a file."""
    solved = re.search(r"Head solved with l2=\S+, cv_loss=(\S+): accuracy (\S+),", text)
    on_phone = re.search(r"accuracy ([\d.]+)%, in Keras", text)
    return [float(one) for found in (solved, on_phone) if found for one in found.groups()]


def test_links_of_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
        assert links or page.name in ("android.md", "CONTRIBUTING.md")
        for link in links:
            assert link.startswith("http") or (page.parent / link).exists(), (page, link)


@pytest.mark.slow
def test_the_benchmark_writes_table_numbers_and_plot(tmp_path):
    script = ROOT / "benchmarks" / "paradigms.py"
    run(script, "--data", "digits", "--seeds", 2, "--out", tmp_path, folder=tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json", ".png"}
    table = (tmp_path / "paradigms_digits.md").read_text()
    assert "python benchmarks/paradigms.py --data digits --seeds 2" in table
    assert table.count("±") == 5


@pytest.mark.slow
def test_the_speed_benchmark_writes_its_table(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{kind}": rng.integers(0, 256, (40, 32, 32, 3)).astype("uint8")
        if kind == "images"
        else rng.integers(0, 10, 40)
        for split in ("train", "test")
        for kind in ("images", "labels")
    }
    np.savez(tmp_path / "pictures.npz", **arrays)
    network = keras.applications.MobileNet(include_top=False, weights=None, alpha=0.25)
    network.save_weights(tmp_path / "m.weights.h5")
    script = ROOT / "benchmarks" / "transfer_speed.py"
    run(script, "--pictures", tmp_path / "pictures.npz", "--mobilenet", tmp_path / "m.weights.h5",
        "--repeats", 1, "--pictures-in-memory", 64, "--out", tmp_path / "out",
        folder=tmp_path)  # fmt: skip
    report = (tmp_path / "out" / "transfer_speed.md").read_text()
    assert report.count("| MobileNet 0.25 |") == 5
    assert "(goal 0.20)" in report
    assert "`import keras_lp` takes" in report


@pytest.mark.slow
def test_phones_equal_federated_averaging(tmp_path):
    pytest.importorskip("ai_edge_litert.interpreter")
    printed = run(ROOT / "examples" / "phones_federated.py", "--rounds", 4, folder=tmp_path)
    losses = [float(loss) for loss in re.findall(r"round \d: loss ([\d.]+)", printed)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "round 2: " in printed
    assert "3 of 5 updates averaged" in printed
    assert "update 3 refused: it is stale" in printed
    assert "update 4 refused: 'w4_predictions_kernel' with values that are not finite" in printed
    difference = float(re.search(r"FederatedAveraging (\S+)", printed).group(1))
    assert difference < 1e-4
