"""Names of host libraries that hf_slim relies on without a promise: each is still there, and each is listed.

And what a host is about to remove: its warnings about our own modules are errors, see pyproject.toml.
"""

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_slim
from hf_slim.integration.upstream import TABLE, Check, Upstream

PACKAGE = Path(hf_slim.__file__).parent
LIST = PACKAGE / "integration" / "upstream"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if LIST not in path.parents]
WATCHED = ("transformers.", "accelerate.", "peft.", "trl.", "torch.nn.modules")  # whose inner modules are listed
OF_PYTHON = {"_SubParsersAction"}  # private names of the standard library
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")


def named(row: Upstream) -> str:
    return f"{row.name}-{row.check.name.lower()}"


def found(name: str) -> object:
    """The object with this dotted name. Raises ImportError or AttributeError."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            target: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            target = getattr(target, part)
        return target
    raise ImportError(f"no module of '{name}' can be imported")


def parameters(target: object) -> set[str]:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return {argument.name for argument in target.default._schema.arguments}
    return set(inspect.signature(target).parameters)


def is_set_by(cls: type, attribute: str) -> bool:
    """Whether instances have the attribute: a field of a dataclass, or what some method assigns to `self`."""
    assigned = rf"self\.{attribute}\b(\s*:[^=\n]+)?\s*=[^=]|__setattr__\(\s*[\"']{attribute}[\"']"
    bases = [base for base in cls.__mro__ if base.__module__ != "builtins"]
    return any(attribute in vars(base).get("__annotations__", {}) for base in bases) or any(
        re.search(assigned, source(base)) for base in bases
    )


def source(target: object) -> str:
    try:
        return inspect.getsource(target)
    except (OSError, TypeError):  # written in C
        return ""


def follow_each_other(text: str, pieces: tuple[str, ...]) -> bool:
    place = 0
    for piece in pieces:
        place = text.find(piece, place)
        if place < 0:
            return False
    return True


def holds(row: Upstream) -> bool:
    """Whether what the row says is true. Raises ImportError or AttributeError where there is no such name."""
    if row.check is Check.SETS:
        return is_set_by(found(row.name.rpartition(".")[0]), row.attribute)
    target = found(row.name)
    if row.check is Check.TAKES:
        return set(row.what) <= parameters(target)
    if row.check is Check.TAKES_ONE:
        return bool(set(row.what) & parameters(target))
    if row.check is Check.SAYS:
        return follow_each_other(source(target), row.what)
    if row.check is Check.EQUALS:
        return (target,) == row.what
    return row.check is Check.EXISTS or all(hasattr(target(), name) for name in row.what)


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_what_hf_slim_relies_on_is_there(row):
    if importlib.util.find_spec(row.library) is None:
        pytest.skip(f"{row.library} is not installed")
    version = getattr(importlib.import_module(row.library), "__version__", "?")
    what = f" {', '.join(row.what)}" if row.what else ""
    broken = (
        f"`{row.name}` must be a name that {row.check.value}:{what} (relied on since {row.library} {row.since}, "
        f"installed is {version}). Needed by {', '.join(f'hf_slim/{file}' for file in row.files)}. {row.why}"
    )
    try:
        is_there = holds(row)
    except (ImportError, AttributeError) as error:
        raise AssertionError(f"{broken} {type(error).__name__}: {error}") from error
    assert is_there, broken


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_the_files_of_a_row_need_it(row):
    assert row.files
    assert row.why.endswith(".")
    assert re.fullmatch(r"\d+\.\d+", row.since)
    assert bool(row.what) == (row.check not in (Check.EXISTS, Check.SETS))
    for file in row.files:
        text = (PACKAGE / file).read_text()
        words = set(re.findall(r"\w+", text))
        telling = {word for piece in row.what for word in re.findall(r"\w{8,}|\w+_\w+", piece)}
        says = set(row.what) <= words if row.check is Check.HAS else row.attribute in words or words & telling
        assert says, f"hf_slim/{file} does not speak of {row.name} {row.what}"


def test_every_check_can_fail():
    def false(name: str, check: Check, *what: str) -> bool:
        return not holds(Upstream(name, "2.13", ("",), "", check, what))

    assert false("torch.nn.Linear", Check.TAKES, "in_features", "no_such")
    assert false("torch.ops.aten._int_mm", Check.TAKES, "no_such")
    assert false("torch.nn.Linear", Check.TAKES_ONE, "no_such", "nor_this")
    assert false("torch.nn.Linear.no_such", Check.SETS)
    assert false("torch.nn.Linear.forward", Check.SAYS, "self.weight", "input")  # the other way round
    assert false("torch.nn.Linear.__module__", Check.EQUALS, "torch.nn")
    assert false("torch.nn.Identity", Check.HAS, "training", "no_such")
    with pytest.raises(AttributeError):
        holds(Upstream("torch.nn.no_such", "2.13", ("",), ""))
    with pytest.raises(ImportError):
        holds(Upstream("no_such_library.name", "1.0", ("",), ""))


def uses(tree: ast.Module) -> Iterator[str]:
    """Names with an underscore in front that a file reads, writes or asks for by their text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call):
            asked = node.args[1:2] if getattr(node.func, "id", "") in BY_NAME else node.args[:1]
            yield from (a.value for a in asked if isinstance(a, ast.Constant) and isinstance(a.value, str))


def own_names() -> set[str]:
    """Functions, classes and attributes that hf_slim itself defines."""
    found = set(OF_PYTHON)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if getattr(node.value, "id", "") == "self" else set()
    return found


def is_listed(name: str, file: str) -> bool:
    return any(
        file in row.files and (name in row.name.split(".") or any(name in piece for piece in row.what))
        for row in TABLE
    )


def test_every_private_name_of_a_host_is_listed():
    own, missing = own_names(), []
    for path in FILES:
        file = path.relative_to(PACKAGE).as_posix()
        private = {name for name in uses(ast.parse(path.read_text())) if re.fullmatch(r"_[a-z]\w*", name)}
        missing += [f"hf_slim/{file}: {name}" for name in sorted(private - own) if not is_listed(name, file)]
    assert not missing, f"Add rows to hf_slim/integration/upstream: {missing}"


def test_every_import_from_inside_a_host_is_listed():
    missing, count = [], 0
    for path in FILES:
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(WATCHED):
                names = [alias.name for alias in node.names]
                count += len(names)
                missing += [f"hf_slim/{file}: {name}" for name in names if not is_listed(name, file)]
    assert count > 5
    assert not missing, f"Add rows to hf_slim/integration/upstream: {missing}"


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning])
def test_warnings_of_our_own_modules_are_errors(category):
    def warn(module: str) -> None:
        scope = {"__name__": module, "category": category}
        exec("import warnings; warnings.warn('this will go', category)", scope)

    for ours in ("hf_slim", "hf_slim.integration.kv_cache"):
        with pytest.raises(category, match="this will go"):
            warn(ours)
    for another in ("transformers.trainer", "hf_slimmer"):
        warn(another)
