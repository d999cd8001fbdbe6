"""Explanations of settings, as text for a terminal."""

import textwrap
from collections.abc import Iterable

from hf_slim.core.registry import Registry
from hf_slim.workflows.settings.setting import (
    Setting,
    all_settings,
    doc_of,
    find_setting,
    paragraphs_of,
    settings_of,
)

WIDTH, COLUMN = 100, 35  # width of the text, and column where explanations begin in the overview
BASICS = ("model", "output", "task")
SECTION_DEFAULTS = ("default null", "its own defaults")


def describe_settings(section: str | None = None) -> str:
    """Explanations of settings, as text for a terminal.

    Args:
        section: A section ("pruning"), a section within one ("distillation.hidden"), or one setting
            ("pruning.criterion", "training.learning_rate"). None: one line for every setting of every section.
    Raises: SlimError: if there is no such section or setting; names the nearest.
    """
    if section is None:
        return _overview()
    setting = find_setting(section)
    lines = _block(setting, with_names=setting.inner is None)
    if setting.inner is not None:
        about = [part for part in paragraphs_of(setting.inner) if part != setting.doc]
        lines += ["", *_wrapped("\n\n".join(about))] if about else []
        for inner in settings_of(setting.inner, setting.path):
            lines += ["", *_block(inner)]
    return "\n".join(lines)


def _overview() -> str:
    lines = [
        "Every setting of a recipe, with its default. `hf-slim settings pruning` explains a section in full,",
        "`hf-slim settings pruning.criterion` one setting.",
        "",
    ]
    for setting in all_settings():
        depth = setting.path.count(".")
        if not depth and setting.name not in BASICS:
            lines.append("")
        is_section = setting.inner is not None and setting.default in SECTION_DEFAULTS
        default = "" if is_section else f" ({setting.default.removeprefix('default ')})"
        first = f"{'  ' * depth}{setting.name}{default}"
        lines += _hanging(f"{first:<{COLUMN - 1}} {setting.summary}", COLUMN)
    return "\n".join(lines)


def _block(setting: Setting, with_names: bool = False) -> list[str]:
    """The full explanation of a setting; `with_names` also explains each of its allowed names, one per line."""
    lines = [f"{setting.path}: {setting.annotation}, {setting.default}", *_wrapped(setting.doc)]
    if setting.names and not with_names:
        lines += _wrapped(f"Names: {', '.join(setting.names)}.")
    if setting.keys:
        lines += _wrapped(f"Keys: {', '.join(setting.keys)}.")
    if setting.names and with_names:
        lines += ["", *(line for name in setting.names for line in _name_lines(name, setting.choices))]
    return lines


def _name_lines(name: str, choices: Iterable[str | None]) -> list[str]:
    doc = doc_of(choices[name]) if isinstance(choices, Registry) else ""
    first = " ".join(doc.partition("\n\n")[0].split())
    return _hanging(f"  {name:<18} {first}".rstrip(), 21)


def _hanging(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def _wrapped(text: str) -> list[str]:
    """Paragraphs of text, wrapped and indented."""
    return [line for part in text.split("\n\n") for line in _hanging(f"  {' '.join(part.split())}", 2)]
