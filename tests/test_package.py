"""The package as a whole: imports, docstrings, what a user sees without TFF."""

import ast
import doctest
import importlib
import pkgutil
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import keras_lp as lp
from keras_lp.federated import check, tff_runtime
from keras_lp.federated.engine import installation


def test_importing_the_package_loads_nothing_that_keras_does_not():
    code = """
import sys, keras, tensorflow
before = set(sys.modules)
import keras_lp
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(eval(result.stdout)) - set(sys.stdlib_module_names)
    assert loaded == {"keras_lp"}


def test_every_public_name_is_there():
    assert dir(lp) == sorted([*lp.__all__, "__version__"])
    for name in lp.__all__:
        assert getattr(lp, name).__doc__
    with pytest.raises(AttributeError, match="transfer_modl"):
        lp.transfer_modl  # noqa: B018


def test_editors_see_the_names_that_are_loaded_when_first_used():
    tree = ast.parse(Path(lp.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == lp._LAZY


def modules():
    return [
        module.name
        for module in pkgutil.walk_packages(lp.__path__, "keras_lp.")
        if not module.name.endswith("__main__")
    ]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch, request):
    if name == "keras_lp.federated.averaging" and installation.unsupported_platform():
        pytest.skip("TFF has wheels for Linux x86-64 only")
    if name in ("keras_lp.web.export", "keras_lp.web.server"):
        request.getfixturevalue("litert")
    monkeypatch.chdir(tmp_path)  # examples write files
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
def test_the_check_runs_a_real_round(capsys):
    assert check.main() == 0
    assert "One federated round over 2 clients ran" in capsys.readouterr().out


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--rounds", 2)])
def test_the_check_says_what_it_is_and_refuses_arguments(argument, code, capsys):
    with pytest.raises(SystemExit) as ended:
        check.main([argument])
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert "usage: python -m keras_lp.federated.check" in printed.out + printed.err
    assert "One federated round" not in printed.out


@pytest.mark.parametrize("pip", [True, False])
def test_without_tff_the_check_prints_the_commands(monkeypatch, capsys, pip):
    gone = {"tensorflow_federated", "dp_accounting"}
    installed = installation.is_installed
    monkeypatch.setattr(
        installation, "is_installed", lambda name: name not in gone and installed(name)
    )
    monkeypatch.setattr(installation, "_has_pip", lambda: pip)
    monkeypatch.setattr(installation, "unsupported_platform", lambda: None)
    assert check.main() == 1
    printed = capsys.readouterr().out
    assert "Missing: dp_accounting, tensorflow_federated. Run:" in printed
    assert ("ensurepip" in printed) != pip
    command = f"{sys.executable} -m pip install --no-deps --ignore-requires-python -r "
    (line,) = [line.strip() for line in printed.splitlines() if "--no-deps" in line]
    assert line.startswith(command)
    pins = Path(line.removeprefix(command)).read_text()
    assert "tensorflow-federated==0.87.0" in pins
    with pytest.raises(ImportError, match="--no-deps --ignore-requires-python"):
        tff_runtime.load_tff()


def test_a_round_that_fails_is_reported(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no worker")

    monkeypatch.setattr(installation, "unsupported_platform", lambda: None)
    monkeypatch.setattr(installation, "missing_modules", list)
    monkeypatch.setattr(check, "_one_round", broken)
    assert check.main() == 1
    assert "a round failed: RuntimeError: no worker" in capsys.readouterr().out


def test_on_another_platform_the_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert check.main() == 1
    assert "Linux x86-64 only" in capsys.readouterr().out
    with pytest.raises(ImportError, match="Linux x86-64 only"):
        tff_runtime.load_tff()
