"""Where LiteRT.js comes from, with a stand-in for npm."""

import os
import stat
import sys
import tarfile

import pytest

from keras_lp.web import litert_js


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a folder of programs that is searched alone."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache" / "keras_lp"


def npm(tmp_path, code):
    path = tmp_path / "bin" / "npm"
    path.write_text(f"#!{sys.executable}\nimport os, shutil, sys\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def package(tmp_path):
    """A package with the files that a page takes."""
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for files in litert_js._FILES.values():
            for name in files:
                source = tmp_path / "content"
                source.write_text(f"content of {name}")
                archive.add(source, name)
    return path


def test_without_npm_the_error_says_what_to_install(cache):
    with pytest.raises(ImportError, match="Install npm: apt-get install npm"):
        litert_js.litert_js()
    assert os.listdir(cache) == []


def test_without_a_network_the_error_has_the_reason_of_npm(cache, tmp_path):
    npm(tmp_path, "sys.exit('npm error network request failed')")
    with pytest.raises(ConnectionError, match="npm error network request failed"):
        litert_js.litert_js()
    assert os.listdir(cache) == []


def test_another_package_than_the_tested_one_is_refused(cache, tmp_path):
    npm(tmp_path, f"shutil.copy({str(package(tmp_path))!r}, os.path.join(sys.argv[-1], 'x.tgz'))")
    with pytest.raises(ValueError, match="must be the package that npm publishes"):
        litert_js.litert_js()
    assert os.listdir(cache) == []


def test_the_checked_files_are_kept_in_the_cache(cache, tmp_path, monkeypatch):
    import base64
    import hashlib

    path = package(tmp_path)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    monkeypatch.setattr(litert_js, "_INTEGRITY", dict.fromkeys(litert_js._FILES, digest))
    npm(tmp_path, f"shutil.copy({str(path)!r}, os.path.join(sys.argv[-1], 'x.tgz'))")
    folder = litert_js.litert_js()
    assert folder.parent == cache
    assert (folder / "core.js").read_text() == "content of package/dist/index.js"
    assert len(list((folder / "wasm").iterdir())) == 4
    assert "Apache License" in (folder / "LICENSE").read_text()
    (tmp_path / "bin" / "npm").unlink()
    assert litert_js.litert_js() == folder  # without npm
    assert os.listdir(cache) == [folder.name]
