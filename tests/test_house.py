"""Where things live: which room may import from which, and what each room says of itself."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "anee_core"
FLOORS = (
    "errors", "ranges", "files", "checkpoint", "display", "accounting", "adapter", "interfaces", "controllers",
    "cache_policies", "hookspecs", "plugins", "policy", "builtin", "cache", "steps", "engine", "generation", "model",
    "evaluation", "calibration", "conformance", "load", "training", "bench",
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


PYTHON = [path for package in ("anee", "anee_core", "anee_adapters") for path in sorted((ROOT / package).rglob("*.py"))]


WRITERS = {
    "anee_core/files.py": "it is the way",
    "anee_core/training/checkpoints.py": "a folder beside the last checkpoint, which is then renamed",
    "anee_core/conformance/scaffold.py": "a folder that is renamed",
    "benchmarks/train_mini.py": "a file that is renamed",
}
"""Files that write by other means than `write_whole`, and why they may."""


def test_files_are_written_whole():
    ways = {"write_text", "write_bytes", "savefig", "save_file", "save_image", "dump"}
    for path in [*PYTHON, *sorted((ROOT / "benchmarks").glob("*.py"))]:
        if str(path.relative_to(ROOT)) in WRITERS:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        whole = {inner for call in calls if ast.unparse(call.func) == "write_whole" for inner in ast.walk(call)}
        for call in calls:
            name = ast.unparse(call.func)
            wrong = name.rpartition(".")[2] in ways or name in ("torch.save", "np.save") or _opens_to_write(call)
            assert not wrong or call in whole, f"{path}: {ast.unparse(call)} is not inside write_whole"


def _opens_to_write(call):
    """Return whether a call opens a file to write it."""
    if ast.unparse(call.func).rpartition(".")[2] != "open":
        return False
    given = [*call.args, *(word.value for word in call.keywords)]
    return any(isinstance(a, ast.Constant) and re.fullmatch(r"[wax]b?\+?", str(a.value)) for a in given)


def functions(path):
    """Return the functions of a file, each with the docstring that speaks of its parameters."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    yield inner, ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            yield node, ast.get_docstring(node) or ""


def test_more_than_six_parameters_have_a_reason():
    for path in PYTHON:
        for function, told in functions(path):
            given = function.args
            names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            reason = "takes many parameters because" in " ".join(told.split())
            assert count <= 6 or reason, f"{path}: {function.name} takes {count} parameters and does not say why"


def test_structs_in_c_and_in_python_have_the_same_fields():
    from anee_core.steps.native.structs import MIRRORED

    header = (CORE / "steps" / "native" / "cpp" / "structs.h").read_text()
    header = re.sub(r"//.*", "", header)
    for struct in MIRRORED:
        body = re.search(rf"struct {struct.__name__} \{{(.*?)\n\}};", header, flags=re.DOTALL)[1]
        body = re.sub(r"\n    \w+ \w+\([^)]*\) const \{.*?\n    \}", "", body, flags=re.DOTALL)
        fields = []
        for declaration in filter(None, (part.strip() for part in body.split(";"))):
            fields += [re.search(r"(\w+)$", piece.strip())[1] for piece in declaration.split(",")]
        assert fields == [name for name, _ in struct._fields_], struct.__name__


def test_a_library_with_other_structs_is_not_used(monkeypatch):
    from anee_core.steps.native import build

    monkeypatch.setattr(build, "LAYOUT", (*build.LAYOUT[:-1], 1))
    build.library.cache_clear()
    try:
        with pytest.raises(build.NoLibraryError, match="structs are other ones"):
            build.library()
    finally:
        build.library.cache_clear()
