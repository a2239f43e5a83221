"""Where things live: which room may import from which, and what each room says of itself."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "anee_core"
FLOORS = (
    "errors", "files", "checkpoint", "display", "accounting", "adapter", "interfaces", "controllers", "cache_policies",
    "hookspecs", "plugins", "policy", "builtin", "cache", "steps", "engine", "generation", "model", "evaluation",
    "calibration", "load", "training", "bench", "conformance",
)  # fmt: skip
"""Rooms of the core from the ground up: none imports from one that comes later."""
FILES = sorted(CORE.rglob("*.py"))


def module_of(path):
    """Return the dotted name of a file, and whether it is a room's face."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Return the modules that a file imports from the project: at run time, for types, and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("anee", "anee_core", "anee_adapters")}


def room_of(module):
    """Return the room of a module of the core."""
    return module.split(".")[1]


def test_every_room_has_its_floor():
    rooms = {room_of(module_of(path)) for path in FILES if path != CORE / "__init__.py"}
    assert rooms == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    module = module_of(path)
    if module == "anee_core":
        assert not imported(path)
        return
    own = room_of(module)
    for name in imported(path):
        assert name.split(".")[0] == "anee_core", f"{module} imports {name}: the core knows nobody outside"
        if name == "anee_core":
            continue
        room = room_of(name)
        assert FLOORS.index(room) <= FLOORS.index(own), f"{module} imports {name}, from a room above"


def modules():
    """Return the modules of the core, and for each those that it imports; a room's face is left out."""
    known = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    graph = {}
    for module, path in known.items():
        graph[module] = {name for name in imported(path) if name in known}
    return graph


def test_no_circle():
    graph, state = modules(), {}

    def visit(module, way):
        if state.get(module) == "done":
            return
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        for other in sorted(graph[module]):
            visit(other, [*way, module])
        state[module] = "done"

    for module in graph:
        visit(module, [])


def test_inside_the_core_files_are_named_and_not_faces():
    faces = {module_of(path) for path in FILES if path.name == "__init__.py" and path != CORE / "__init__.py"}
    for path in FILES:
        if path.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in faces:
                named = {module_of(p) for p in FILES}
                assert all(f"{node.module}.{a.name}" in named for a in node.names), f"{path}: {ast.unparse(node)}"


def test_no_model_of_transformers_in_the_core():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").startswith("transformers.models"), f"{path} imports {module}"


@pytest.mark.parametrize("face", sorted(p for p in CORE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_a_room_says_in_one_sentence_what_it_is_for(face):
    first = (ast.get_docstring(ast.parse(face.read_text())) or "").split("\n\n")[0]
    assert re.fullmatch(r"[A-Z][^.]*\.", " ".join(first.split())), f"{face}: {first!r}"


@pytest.mark.parametrize("face", sorted(p for p in CORE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_a_face_shows_what_is_there(face):
    module = importlib.import_module(module_of(face))
    assert all(hasattr(module, name) for name in getattr(module, "__all__", ()))


@pytest.mark.parametrize("path", [*FILES, *(ROOT / "tests").rglob("*.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400
