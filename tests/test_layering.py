"""Imports go one way, between rooms and inside them; files and folders stay small enough to find things in."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_slim

PACKAGE = Path(hf_slim.__file__).parent
LAYERS: dict[str, int] = {
    "version": 0, "progress": 0, "timing": 1, "core": 1,
    "vocabulary": 2, "data": 2, "quantization": 2, "pruning": 2, "distillation": 2,
    "integration": 3, "export": 4,
    "evaluation": 5, "student": 5, "hub": 6,
    "recipe": 7, "workflows": 8, "cli": 9, "__init__": 10,
}  # fmt: skip
SUB_ROOMS: dict[str, dict[str, int]] = {  # inside a technique: config <- functions <- modules <- transform <- callback
    "quantization": {
        "grids": 0, "scheme": 1, "storage": 2, "config": 2, "kernels": 3, "layers": 4, "plan": 5, "transform": 6,
        "calibration": 7, "callback": 8,
    },
    "pruning": {
        "matrices": 0, "groups": 1, "removal": 2, "importance": 3, "config": 4, "structure": 5, "budget": 6,
        "state": 7, "transform": 8, "one_shot": 9, "callback": 10,
    },
    "distillation": {
        "capture": 0, "losses": 1, "targets": 2, "on_policy": 3, "config": 4, "objective": 5, "store": 5,
        "teachers": 6, "followed_layers": 7, "forward_pass": 7, "distiller": 8, "state": 9,
        "attaching": 10, "callback": 11,
    },
}  # fmt: skip
MOST_LINES, MOST_FUNCTION, MOST_FILES = 300, 40, 12
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})


def parts_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} imports relatively"
            yield node.module


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_room_has_a_layer():
    rooms = {parts_of(path)[0] for path in FILES}
    assert len(FILES) > 100
    assert rooms <= set(LAYERS)
    for room, layers in SUB_ROOMS.items():
        assert {parts_of(path)[1] for path in FILES if parts_of(path)[0] == room} - {"__init__"} == set(layers)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_one_way(path):
    room, *inner = parts_of(path)
    for module in imported(path):
        if not module.startswith("hf_slim."):
            continue
        other, *rest = module.split(".")[1:]
        assert other == room or LAYERS[other] < LAYERS[room], f"{room} must not import {other}"
        sub_rooms = SUB_ROOMS.get(room)
        if sub_rooms and other == room and inner[0] != "__init__":
            target = rest[0]
            allowed = target == inner[0] or sub_rooms[target] < sub_rooms[inner[0]]
            assert allowed, f"{room}.{inner[0]} must not import {room}.{target}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_only_callbacks_and_what_loads_a_teacher_know_transformers_below_integration(path):
    if parts_of(path)[0] in (*SUB_ROOMS, "vocabulary") and path.name not in ("callback.py", "loading.py"):
        assert not any(module.split(".")[0] == "transformers" for module in imported(path))


@pytest.mark.parametrize("path", [p for p in FILES if parts_of(p)[0] == "core"], ids=named)
def test_core_needs_only_torch(path):
    roots = {module.split(".")[0] for module in imported(path)}
    assert not roots & {"transformers", "accelerate", "datasets", "numpy", "tqdm", "yaml", "safetensors"}


def test_progress_bars_have_one_style_and_one_switch():
    users = [named(path) for path in FILES if any(module.split(".")[0] == "tqdm" for module in imported(path))]
    assert users == ["progress.py"]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_stay_short(path):
    assert path.read_text().count("\n") <= MOST_LINES


@pytest.mark.parametrize("path", FILES, ids=named)
def test_functions_stay_short(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert not [f"{node.name}: {node.lineno}" for node in functions if node.end_lineno - node.lineno >= MOST_FUNCTION]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_folders_stay_small(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_FILES
