"""What the README shows and `make demo` runs."""

import os
import re
import shutil
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


def start(*command, folder, **variables):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def run(*command, folder):
    result = start(*command, folder=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


ROW = r"(.{28}) +([\d.]+)% +([\d,]+) +([\d,]+) +[\d.]+ +([\d,]+|-)"


def rows(printed):
    """By paradigm: accuracy in percent, trainable and all parameters, bytes sent."""
    found = re.findall(f"^{ROW}$", printed, re.MULTILINE)
    return {name.strip(): (float(accuracy), *rest) for name, accuracy, *rest in found}


def rows_of_the_readme():
    section = (ROOT / "README.md").read_text().split("\n## Quickstart\n")[1]
    form = r"^\| ([^|]+) \| ([\d.]+) % \| ([\d,]+) \| ([\d,]+) \| [\d.]+ \| ([\d,]+|-) \|$"
    found = re.findall(form, section, re.MULTILINE)
    return {name: (float(accuracy), *rest) for name, accuracy, *rest in found}


def test_the_quickstart_prints_the_table_of_the_readme_and_nothing_else(tmp_path):
    result = start(ROOT / "examples" / "quickstart.py", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    printed = result.stdout
    expected = [
        r"Pretrained on 721 pictures of the digits 0 to 4 in \d+ s\. "
        r"Now 5 to 9, from 100 labelled pictures:",
        "",
        " +accuracy +trainable +parameters +seconds +bytes sent",
        *[ROW] * 6,
        "",
        r"The fine-tuned model for a phone: \S+: [\d.]+ KiB, float32, outputs predictions\[1, 5\]",
        "compared with Keras on 64 examples of generated inputs:",
        r"  predictions: largest difference \S+, top-1 agreement [\d.]+%",
        r"a call of 1 example, one thread: \S+ ms \(p95 \S+\); accuracy in LiteRT [\d.]+%",
        r"Plot: \S+\. All in \d+ s\.",
    ]
    for line, form in zip(printed.splitlines(), expected, strict=True):
        assert re.fullmatch(form, line), line

    measured, told = rows(printed), rows_of_the_readme()
    assert list(measured) == list(told)
    for name, (accuracy, *counts) in told.items():
        assert measured[name][1:] == tuple(counts)
        # The seed is fixed; processors differ by up to 4 of the 180 images.
        assert accuracy == round(round(accuracy * 1.8) / 1.8, 1)
        assert abs(measured[name][0] - accuracy) <= 2.3
    accuracies = {name: accuracy for name, (accuracy, *_) in measured.items()}
    assert accuracies["transfer"] > accuracies["from scratch"]
    assert accuracies["fine-tuning"] > accuracies["from scratch"]
    files = {path.name for path in (tmp_path / "runs" / "quickstart").iterdir()}
    assert files == {"pretrained.keras", "digits.tflite", "quickstart.png"}
    on_phone = float(re.search(r"accuracy in LiteRT ([\d.]+)%", printed).group(1))
    assert on_phone == accuracies["fine-tuning"]


def test_errors_pass_the_filter_of_the_quickstart(tmp_path):
    """Also those of a process that crashes."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from quiet import hide_machine_notes
hide_machine_notes()
notes = (
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "I0000 00:00:1795952636.950055    8518 cudart_stub.cc:31] Could not find cuda drivers.",
    "E0000 00:00:1795952636.950055    8518 computation_placer.cc:177] already registered.",
    "INFO: Created TensorFlow Lite XNNPACK delegate for CPU.",
)
os.write(2, "".join(f"{line}\\n" for line in notes).encode())
os.write(2, b"E0000 00:00:1795952636.950055    8518 other.cc:1] A real error.\\n")
if sys.argv[2] == "raise":
    raise ValueError("wrong")
os.abort()
"""
    raised = start("-c", code, ROOT / "examples", "raise", folder=tmp_path)
    lines = raised.stderr.splitlines()
    assert raised.returncode == 1
    assert (lines[0][-13:], lines[1][:9], lines[-1]) == (
        "A real error.", "Traceback", "ValueError: wrong",
    )  # fmt: skip
    aborted = start("-c", code, ROOT / "examples", "abort", folder=tmp_path)
    assert aborted.returncode < 0
    assert len(aborted.stderr.splitlines()) == 1
    assert "A real error." in aborted.stderr


@pytest.fixture
def weights(tmp_path):
    network = keras.applications.MobileNet((96, 96, 3), 0.25, include_top=False, weights=None)
    network.save_weights(tmp_path / "m.weights.h5")
    return tmp_path / "m.weights.h5"


QUICK = {
    "keyboard.py": "Accuracy of the next character on held-out text",
    "phone.py": "largest difference from FederatedAveraging",
    "privacy_audit.py": "Without a defence, the attacker reads 2 of 2 examples.",
    "support_assistant.py": "adapters on disk",
    "tune_everything.py": "test accuracy  default    found",
    "web_digits.py": "python -m http.server 8000",
    "text_multitask.py": "Wo ist der Bahnhof?",
    "xray_transfer.py": "balanced accuracy",
}
MODULES = {"prepared.py", "quiet.py"}  # what examples import


def test_every_example_is_run():
    found = {path.name for path in (ROOT / "examples").iterdir() if path.suffix == ".py"}
    assert found == {*QUICK, *MODULES, "quickstart.py", "phones_federated.py"}
    for name in found - MODULES - {"phone.py"}:
        assert "--quick" in (ROOT / "examples" / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_the_quick_form_of_an_example_runs_from_any_folder(name, tmp_path, request):
    if name == "web_digits.py" and shutil.which("npm") is None:
        pytest.skip("needs npm")
    if name not in ("phone.py", "privacy_audit.py", "tune_everything.py", "web_digits.py"):
        request.getfixturevalue("tfds_dir")
    more = ["--weights", request.getfixturevalue("weights")] if name == "xray_transfer.py" else []
    assert QUICK[name] in run(ROOT / "examples" / name, "--quick", *more, folder=tmp_path)


def test_an_example_without_its_data_ends_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import prepared

    monkeypatch.setattr(prepared, "has_network", lambda: False)
    with pytest.raises(SystemExit) as ended, prepared.ended_without_data():
        prepared.load("tiny_shakespeare", split="train", data_dir=str(tmp_path))
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"tiny_shakespeare is not in {tmp_path}/tiny_shakespeare/1.0.0, and there is no network "
        "to download it. Pass --data-dir or set TFDS_DATA_DIR.\n"
    )
    for name in ("keyboard", "support_assistant", "text_multitask", "xray_transfer"):
        assert "with ended_without_data():" in (ROOT / "examples" / f"{name}.py").read_text()


@pytest.mark.parametrize(("page", "count"), [("README.md", 2), ("docs/guide.md", 25)])
def test_the_examples_of_the_pages_run_and_print_what_is_shown(page, count, tmp_path):
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    offline = [block for block in blocks if "needs an internet connection" not in block]
    assert len(offline) == count
    (tmp_path / "page.py").write_text("\n".join(offline))
    printed = run("page.py", folder=tmp_path)
    assert "digits.tflite: " in printed
    assert shown_figures(text)
    pairs = zip(shown_figures(text), shown_figures(printed), strict=False)
    for told, measured in pairs:  # the same, as far as processors agree
        assert measured == pytest.approx(told, rel=0.3)


def test_the_examples_of_the_page_about_browsers_run(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "web.md").read_text(), re.DOTALL)
    offline = [block for block in blocks if "uvicorn.run" not in block]
    assert (len(offline), len(blocks)) == (3, 4)
    (tmp_path / "page.py").write_text("\n".join(offline))
    printed = run("page.py", folder=tmp_path)
    assert "digits_page: a page of" in printed
    assert "epsilon" in printed


def shown_figures(text):
    """The error of cross-validation and the accuracy of a head; the accuracy of a file."""
    solved = re.search(r"Head solved with l2=\S+, cv_loss=(\S+): accuracy (\S+),", text)
    on_phone = re.search(r"accuracy ([\d.]+)%, in Keras", text)
    return [float(one) for found in (solved, on_phone) if found for one in found.groups()]


def test_links_of_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
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
    assert table.count("±") == 6


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
