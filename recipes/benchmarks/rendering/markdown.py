"""Tables and numbers as Markdown. What was not measured is a dash in a table that has other numbers of that row."""

from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "-"
Rows = dict[str, dict[str, Any]]  # row name -> measures, as `values_of` gives them


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first `text_columns` are text and the others numbers; empty without rows."""
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    alignment = ["---"] * text_columns + ["---:"] * (len(titles) - text_columns)
    lines = [f"| {' | '.join(titles)} |", f"|{'|'.join(alignment)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def measure(rows: Rows, row: str, *path: str) -> Any:
    """The value at `path` of a row; None if it was not measured."""
    found: Any = rows.get(row)
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def median(value: Any) -> float | None:
    """The number that stands for a value: the median of a spread."""
    return value["median"] if isinstance(value, dict) else value


def number(value: Any, pattern: str = "{:.3f}") -> str:
    """The number in that format, for example `"{:.1f} ms"`; with the smallest and largest where it is a spread."""
    if value is None:
        return MISSING
    if not isinstance(value, dict):
        return pattern.format(value)
    without_unit = pattern[: pattern.index("}") + 1]
    low, high = (without_unit.format(value[end]) for end in ("low", "high"))
    return f"{pattern.format(value['median'])} [{low}, {high}]"


def ratio(value: Any, reference: Any, pattern: str = "{:.2f}x") -> str:
    """`value / reference`, of medians."""
    value, reference = median(value), median(reference)
    if value is None or not reference:
        return MISSING
    return pattern.format(value / reference)


def change(value: Any, reference: Any) -> str:
    """How much more `value` is than `reference`, in percent."""
    value, reference = median(value), median(reference)
    if value is None or not reference:
        return MISSING
    return f"{value / reference - 1:+.1%}"


def scaled(value: Any, factor: float) -> Any:
    """A number, or every part of a spread, times `factor`."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: value[key] * factor for key in ("median", "low", "high")}
    return value * factor
