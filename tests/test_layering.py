"""Imports go one way: core <- techniques <- integration | export | evaluation <- recipe <- measure <- train <- cli."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_slim

PACKAGE = Path(hf_slim.__file__).parent
LAYER = {
    "version": 0, "core": 0,
    "quantization": 1, "pruning": 1, "distillation": 1,
    "integration": 2, "export": 2, "evaluation": 2,
    "student": 3, "recipe": 4, "measure": 5, "reporting": 5, "sensitivity": 5, "stages": 5, "vocabulary": 5,
    "describe": 6, "train": 7, "cache_teacher": 8, "cli_teaching": 9, "cli": 10, "__init__": 11,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} imports relatively"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    for module in imported(path):
        if module.startswith("hf_slim."):
            other = module.split(".")[1]
            assert other == room or LAYER[other] < LAYER[room], f"{room} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_callbacks_and_what_loads_a_teacher_know_transformers_below_integration(path):
    if LAYER[room_of(path)] == 1 and path.name not in ("callback.py", "loading.py"):
        assert not any(module.split(".")[0] == "transformers" for module in imported(path))


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "core"], ids=lambda path: path.name)
def test_core_needs_only_torch(path):
    roots = {module.split(".")[0] for module in imported(path)}
    assert not roots & {"transformers", "accelerate", "datasets", "numpy", "tqdm", "yaml", "safetensors"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert path.read_text().count("\n") <= 300
