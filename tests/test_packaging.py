"""What an installer reads and an archive holds."""

import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import keras_lp as lp

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def tracked():
    """The files of the repository, or of the unpacked archive."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not in a clone of the repository")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listed.stdout.split("\n")[:-1]


@pytest.fixture(scope="module")
def archives(tracked, tmp_path_factory):
    """The sdist, and the wheel that is built from it; no network."""
    folder = tmp_path_factory.mktemp("archives")
    for name in tracked:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target, follow_symlinks=False)

    def build(kind, source):
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)

    build("sdist", folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="tar")
    (unpacked,) = (folder / "unpacked").iterdir()
    build("wheel", unpacked)
    (wheel,) = folder.glob("*.whl")
    return unpacked, zipfile.ZipFile(wheel)


def test_the_sdist_holds_what_the_repository_holds(tracked, archives):
    unpacked, _ = archives
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    # Left out: what serves only the repository, and the plots and numbers of the benchmarks.
    left_out = re.compile(r"\.(ci|github)/|\.gitignore|benchmarks/results/.*\.(json|jsonl|png)$")
    missing = {name for name in tracked if name not in held and not left_out.match(name)}
    assert missing == {name for name in missing if not (ROOT / name).exists()}
    assert "requirements-tff.txt" in held


def test_the_wheel_holds_the_package_and_its_data(tracked, archives):
    _, wheel = archives
    package = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert package == {
        name for name in tracked if name.startswith("keras_lp/") and (ROOT / name).exists()
    }
    assert "keras_lp/py.typed" in package
    pins = wheel.read("keras_lp/federated/requirements-tff.txt")
    assert pins == (ROOT / "requirements-tff.txt").read_bytes()


def test_the_wheel_has_the_metadata_of_setup_cfg(setup_cfg, archives):
    _, wheel = archives
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = wheel.read(name).decode()
    for field, value in {
        "Version": setup_cfg["metadata"]["version"],
        "Summary": setup_cfg["metadata"]["description"],
        r"License(-Expression)?": setup_cfg["metadata"]["license"],  # by the version of setuptools
        "Requires-Python": setup_cfg["options"]["python_requires"],
        "Description-Content-Type": "text/markdown",
    }.items():
        assert re.search(rf"^{field}: {re.escape(value)}$", metadata, re.MULTILINE)
    required = re.findall(r"^Requires-Dist: ([\w.-]+)\S*$", metadata, re.MULTILINE)
    wanted = setup_cfg["options"]["install_requires"].split()
    assert sorted(required) == sorted(re.match(r"[\w.-]+", one).group() for one in wanted)
    extras = re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE)
    assert sorted(extras) == sorted(setup_cfg["options.extras_require"])


def test_all_files_tell_the_same_version(setup_cfg):
    citation = (ROOT / "CITATION.cff").read_text()
    version = setup_cfg["metadata"]["version"]
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE).group(1) == version
    assert lp.__version__ == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_uv_installs_what_make_install_does(setup_cfg, pyproject):
    assert pyproject["project"]["requires-python"] == setup_cfg["options"]["python_requires"]
    project, *tff = pyproject["dependency-groups"]["dev"]
    (installed, _) = re.findall(r"--editable '\.(\[.*\])'", (ROOT / "Makefile").read_text())
    assert project == f"keras_lp{installed}"
    pins = (ROOT / "requirements-tff.txt").read_text().splitlines()
    pins = [line for line in pins if not line.startswith("#")]
    assert [one.split(";")[0] for one in tff] == pins
    ignored = pyproject["tool"]["uv"]["dependency-metadata"]
    assert [f"{one['name']}=={one['version']}" for one in ignored] == pins
    assert all(one["requires-dist"] == [] for one in ignored)


def install_lines():
    """The lines of the README's section Install, by block."""
    section = (ROOT / "README.md").read_text().split("\n## Install\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [[line.split(" #")[0].rstrip() for line in block.splitlines()] for block in blocks]


def test_the_readme_says_how_to_install():
    assert install_lines() == [
        [
            "pip install .",
            "pip install '.[all]'",
            "pip install --no-deps --ignore-requires-python -r requirements-tff.txt",
            "python -m keras_lp.federated.check",
        ],
        ["uv sync", "uv run python -m keras_lp.federated.check"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("installer", [0, 1], ids=["pip", "uv"])
def test_the_install_lines_of_the_readme_run(installer, tracked, tmp_path):
    """Needs the package index."""
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "venv", ".env"], cwd=tmp_path, check=True)
    lines = [". .env/bin/activate", *install_lines()[installer]]
    if installer == 1:
        lines.insert(1, "pip install uv && export UV_PYTHON=$VIRTUAL_ENV/bin/python")
    done = subprocess.run(
        "\n".join(["set -e", "unset PYTHONPATH", *lines]),
        shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "One federated round over 2 clients ran" in done.stdout
