"""The folders of the package import in one direction."""

import ast
from pathlib import Path

import pytest

import keras_lp

PACKAGE = Path(keras_lp.__file__).parent
# Each imports from itself and from those before it.
ROOMS = [
    *("utils", "privacy", "tasks", "backbones", "balancing", "model", "transfer", "finetuning"),
    "multitask",
]
ROOMS_OF = {
    "federated": ["clients", "engine", "fleet"],
    "tflite": ["device", "metadata", "export", "training"],
}
# Each imports from itself, from `ROOMS`, and from these.
AROUND = {"data": [], "tuning": ["federated"], "audit": ["federated"], "web": ["tflite"]}
# Heavy or optional packages, and the folder or file that alone imports each.
ALONE = {
    "tensorflow_datasets": "data",
    "keras_hub": "backbones",
    "ai_edge_litert": "tflite/device",
    "flwr": "federated/fleet",
    "matplotlib": "",
}


def imports(path):
    """Yields `(module, whether at the top)` for each import of a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top


def files(folder):
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_the_rooms_before_it(room):
    allowed = {*ROOMS[: ROOMS.index(room) + 1]}
    assert files(PACKAGE / room)
    for path in files(PACKAGE / room):
        for module, _ in imports(path):
            if module.startswith("keras_lp."):
                assert module.split(".")[1] in allowed, (path, module)


@pytest.mark.parametrize("room", ROOMS_OF)
def test_rooms_inside_federated_and_tflite(room):
    inner = ROOMS_OF[room]
    for path in files(PACKAGE / room):
        own = path.relative_to(PACKAGE / room).parts[0]
        for module, _ in imports(path):
            if not module.startswith("keras_lp."):
                continue
            parts = module.split(".")
            assert parts[1] in {*ROOMS, room}, (path, module)
            if parts[1] == room and own in inner and parts[2] in inner:
                assert inner.index(parts[2]) <= inner.index(own), (path, module)


@pytest.mark.parametrize("room", AROUND)
def test_rooms_around_the_builders(room):
    for path in files(PACKAGE / room):
        for module, _ in imports(path):
            if module.startswith("keras_lp."):
                assert module.split(".")[1] in {*ROOMS, room, *AROUND[room]}, (path, module)


def test_only_tuning_imports_keras_tuner():
    found = {
        path.relative_to(PACKAGE).parts[0]
        for path in files(PACKAGE)
        for module, _ in imports(path)
        if module.split(".")[0] == "keras_tuner"
    }
    assert found == {"tuning"}


def test_all_rooms_are_in_the_lists():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == {*ROOMS, *ROOMS_OF, *AROUND}
    for room, inner in ROOMS_OF.items():
        found = {p.name for p in (PACKAGE / room).iterdir() if p.is_dir() and p.name[0] != "_"}
        assert found == {*inner}


def test_heavy_packages_are_imported_in_one_place_and_not_at_the_top():
    found = {name: set() for name in ALONE}
    for path in files(PACKAGE):
        for module, top in imports(path):
            name = module.split(".")[0]
            if name in ALONE:
                assert not top, (path, module)
                found[name].add(path.relative_to(PACKAGE).as_posix())
    for name, place in ALONE.items():
        assert found[name], name
        assert all(path.startswith(place) for path in found[name]), (name, found[name])
