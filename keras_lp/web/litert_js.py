"""LiteRT.js, the runtime of the pages, from npm."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from importlib import resources
from pathlib import Path

VERSION = "2.5.3"  # that the tests ran
_CORE, _UTILS = f"@litertjs/core@{VERSION}", f"@litertjs/wasm-utils@{VERSION}"
_INTEGRITY = {  # sha512, as npm publishes it
    _CORE: "PlGmbMOq9WitX7FO0jhbdJw9GthatsyuCQXjTt/w"
    "JZo0FLaw48q4tz8IwqgqCIkviYGr9OFDL1kCnN4nzWoyJQ==",
    _UTILS: "4fJiw6tBQnIs+0jH/OQ16nYOiSl8/+zZnn5h2ul8"
    "aTKHi05sVqZW580Tmk78pC2kT39A9OYBVdFawteZ/sI1kQ==",
}
_WASM = (
    "litert_wasm_internal.js",
    "litert_wasm_internal.wasm",
    "litert_wasm_compat_internal.js",  # for browsers without relaxed SIMD
    "litert_wasm_compat_internal.wasm",
)
# Files of the packages, and their names in the folder of a page.
_FILES = {
    _CORE: {
        "package/dist/index.js": "core.js",
        **{f"package/wasm/{name}": f"wasm/{name}" for name in _WASM},
    },
    _UTILS: {"package/dist/index.js": "wasm-utils.js"},
}
_TIME = 600  # seconds for a download


def litert_js() -> Path:
    """Returns the folder of LiteRT.js in the cache of the user, downloaded when it is not there.

    The cache is `keras_lp` in `$XDG_CACHE_HOME`, by default in `~/.cache`.

    Raises:
        ImportError: npm is not installed.
        ConnectionError: npm cannot download the packages.
        ValueError: a package is not the one that was tested.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keras_lp"
    folder = cache / f"litertjs-{VERSION}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / "litert"
        for package, files in _FILES.items():
            _extract(_download(package, Path(temporary)), files, made)
        license_file = resources.files("keras_lp.web") / "site" / "litert-license.txt"
        (made / "LICENSE").write_text(license_file.read_text())
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _download(package: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise ImportError(
            "A page needs LiteRT.js, which npm downloads once. Install npm: apt-get install npm, "
            "brew install node, or https://nodejs.org."
        )
    name = package.replace("@", "").replace("/", "-")
    place = folder / name
    place.mkdir()
    try:
        done = subprocess.run(
            [npm, "pack", package, "--loglevel=error", "--pack-destination", str(place)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIME,
            check=False,
        )
        reason = done.stderr.strip()
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_TIME} seconds"
    found = list(place.glob("*.tgz"))
    if len(found) != 1:
        raise ConnectionError(
            f"npm must download {package}, the runtime of the page. Received: {reason[-300:]!r}. "
            "Check the network and `npm config get registry`."
        )
    digest = hashlib.sha512(found[0].read_bytes()).digest()
    if base64.b64encode(digest).decode() != _INTEGRITY[package]:
        raise ValueError(
            f"{package} must be the package that npm publishes. Received: one with another sha512 "
            "digest. Check `npm config get registry`."
        )
    return found[0]


def _extract(archive: Path, files: dict[str, str], folder: Path) -> None:
    with tarfile.open(archive) as opened:
        for source, name in files.items():
            member = opened.extractfile(source)
            if member is None:
                raise ValueError(f"{archive.name} must have the file {source}. Received: a link.")
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(member.read())
