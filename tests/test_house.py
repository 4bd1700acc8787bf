"""The rooms of src/adafrugal: what each may import, and how large its parts are."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

SRC = REPOSITORY / "src"
MODULES = {
    ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(SRC.rglob("*.py"))
}
SETTINGS = {"settings", "system"}
ALLOWED = {  # room -> the rooms that it may import
    "": {"settings", "training", "tracking"},  # `adafrugal.train`, when it is called
    "system": set(),
    "optim": set(),
    "settings": {"system", "optim.choices", "optim.controls"},
    "tracking": SETTINGS,
    "data": SETTINGS,
    "integrations": {"optim"},
    "models": {*SETTINGS, "optim"},
    "memory": {*SETTINGS, "optim", "models"},
    "reports": {*SETTINGS, "tracking"},
    "training": {*SETTINGS, "optim", "models", "data", "memory", "tracking"},
    "launching": {
        *SETTINGS, "optim.choices", "optim.controls", "training", "models", "data", "memory", "tracking", "reports"
    },
    "hydra_plugins": {*SETTINGS, "launching"},
}
WITHOUT_TORCH = ("settings", "system", "reports", "optim.choices", "optim.controls", "tracking", "launching")


def imports(file, at_once=False):
    """The modules of ours, and torch, that a file imports; `at_once`: as soon as it is imported itself."""
    found, skipped = [], set()
    for node in ast.walk(ast.parse(file.read_text())):
        is_later = at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_later or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            skipped |= set(ast.walk(node))
        if node not in skipped and isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found += [module + alias.name for alias in node.names]
    longest = (
        next((m for m in (name, name.rpartition(".")[0]) if m in MODULES or m == "torch"), name) for name in found
    )
    return [name for name in longest if name.startswith(("adafrugal", "torch"))]


def room(module):
    parts = module.split(".")
    return parts[0] if parts[0] != "adafrugal" else parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_what_it_may(module):
    allowed = ALLOWED.get(room(module), set())
    for name in imports(MODULES[module]):
        inside = name.removeprefix("adafrugal.")
        if not name.startswith("adafrugal") or room(name) == room(module) or inside == "adafrugal":
            continue
        assert room(name) in allowed or any(inside.startswith(prefix) for prefix in allowed if "." in prefix), name


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: {*imports(file, at_once=True)} & {*MODULES} - {module} for module, file in MODULES.items()}
    assert [*TopologicalSorter(graph).static_order()]


@pytest.mark.parametrize("start", [m for m in MODULES if m.removeprefix("adafrugal.").startswith(WITHOUT_TORCH)])
def test_what_answers_at_once_does_not_wait_for_torch(start):
    """Neither settings, nor jobs, nor reports import torch before it is needed."""
    seen, ahead = set(), [start]
    while ahead:
        module = ahead.pop()
        assert not module.startswith("torch"), f"by way of {sorted(seen)}"
        if module in MODULES and module not in seen:
            seen.add(module)
            ahead += imports(MODULES[module], at_once=True)


def test_modules_have_names_of_their_own_and_rooms():
    names = Counter(module.rpartition(".")[2] for module, file in MODULES.items() if file.name != "__init__.py")
    names.pop("__main__")
    names.update(file.stem for file in (REPOSITORY / "tests").rglob("*.py"))  # pytest imports them by their names
    assert [name for name, count in names.items() if count > 1] == []
    assert [file.name for file in (SRC / "adafrugal").glob("*.py")] == ["__init__.py"]
    assert not {"utils", "helpers", "common"} & set(names)


@pytest.mark.parametrize("file", MODULES.values(), ids=lambda file: str(file.relative_to(SRC)))
def test_files_and_functions_can_be_read_at_a_sitting(file: Path):
    """At most 400 lines a file and 60 a function; ruff counts branches."""
    lines = len((text := file.read_text()).splitlines())
    assert lines <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60} == {}
