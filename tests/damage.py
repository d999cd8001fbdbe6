"""Folders with something wrong: changes to JSON, headers, sizes and names, drawn by hypothesis."""

import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("HF_SLIM_FUZZ", "0"))  # of all fuzzing tests together; 0: as many as take a second each
NAMES = ["../model.safetensors", "/etc/hostname", "/dev/zero", "a/b", "..", "", "\x00", "C:x", "x" * 300, "\ud800"]
NUMBERS = [-1, 0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**63, 10**30, 0.5, float("nan"), float("inf"), True]
JUNK = st.one_of(
    st.sampled_from(NAMES), st.sampled_from(NUMBERS), st.none(), st.text(max_size=12),
    st.integers(-(2**70), 2**70), st.lists(st.integers(-3, 99), max_size=5), st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=6), st.integers() | st.text(max_size=6), max_size=3),
)  # fmt: skip


def fuzzing(few: int, share: float) -> settings:
    """How many inputs a test draws: `few`, or this share of what HF_SLIM_FUZZ says.

    The shares of all tests that load no model sum to 1.
    """
    inputs = max(1, round(INPUTS * share)) if INPUTS else few
    checks = list(HealthCheck)
    return settings(max_examples=inputs, deadline=None, suppress_health_check=checks, database=None)


def places_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places_in(one, (*path, key))


def edit_json(draw: Callable, value: Any) -> Any:
    """The same JSON with one value replaced, removed, doubled under another name, or exchanged with another one."""
    value = json.loads(json.dumps(value))
    places = list(places_in(value))
    if not places:
        return draw(JUNK)
    *path, last = draw(st.sampled_from(places))
    holder = value
    for key in path:
        holder = holder[key]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double", "exchange"]))
    if how == "remove":
        del holder[last]
    elif how == "double" and isinstance(holder, dict):
        holder[draw(st.text(max_size=8) | st.sampled_from([f"{last}x", *map(str, holder)]))] = holder[last]
    elif how == "exchange":
        other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        holder[last], holder[other] = holder[other], holder[last]
    else:
        old = holder[last]
        near = st.sampled_from([old + 1, old - 1, old * 2]) if type(old) is int else JUNK
        holder[last] = draw(JUNK | near)
    return value


def edit_bytes(draw: Callable, raw: bytes) -> bytes:
    """The same bytes cut short, longer, or with some of them replaced."""
    how = draw(st.sampled_from(["cut", "add", "replace", "replace"]))
    place = draw(st.integers(0, max(0, len(raw) - 1)))
    if how == "cut":
        return raw[:place]
    if how == "add":
        return raw + draw(st.binary(min_size=1, max_size=9))
    new = draw(st.binary(min_size=1, max_size=4))
    return raw[:place] + new + raw[place + len(new) :]


def edit_header(draw: Callable, raw: bytes) -> bytes:
    """A safetensors file whose header says something else, with or without the length that it then has."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    text = json.dumps(edit_json(draw, header)).encode()
    says = draw(st.just(len(text)) | st.just(len(text)) | st.integers(0, 2**64 - 1))
    return says.to_bytes(8, "little") + text + data


def damage(draw: Callable, folder: Path, name: str) -> None:
    """Changes a file of a folder in place."""
    path = folder / name
    raw = path.read_bytes()
    how = draw(st.sampled_from(["structure"] * 6 + ["bytes", "bytes", "gone"]))
    if how == "gone":
        path.unlink()
        return
    if how == "bytes" or path.suffix not in (".safetensors", ".json"):
        path.write_bytes(edit_bytes(draw, raw))
    elif name.endswith(".safetensors"):
        path.write_bytes(edit_header(draw, raw))
    else:
        path.write_text(json.dumps(edit_json(draw, json.loads(raw))))


@dataclass
class Memory:
    """The most bytes that Python held at once inside, beyond those before."""

    peak: int = 0


@contextmanager
def memory_used() -> Iterator[Memory]:
    """Memory that Python objects take inside; that of tensors is not counted."""
    memory = Memory()
    tracemalloc.start()
    try:
        yield memory
        memory.peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


_opened: list[str] | None = None


def _notice(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_notice)  # cannot be taken away again, and does nothing between tests


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """Paths of the files that Python opens inside."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None
