"""What every setting of a recipe means: as text for a terminal, and as the Markdown pages of the reference."""

import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

from transformers import TrainingArguments

from hf_slim.core.config import SlimConfig, field_docs
from hf_slim.core.errors import SlimError, nearest
from hf_slim.core.registry import Registry
from hf_slim.integration.techniques import TECHNIQUES, Row
from hf_slim.pruning.importance.criteria import Criterion
from hf_slim.quantization.grids.grid import GridKind
from hf_slim.recipe import SECTIONS, Recipe

WIDTH, COLUMN = 100, 35  # columns of a terminal, and where the texts begin in the overview
BASICS = ("model", "output", "task")
SECTION_DEFAULTS = ("default null", "its own defaults")
TRAINING = "training"  # the section whose settings are those of transformers
CARDS = {  # settings whose names have a card each: their page, beside the reference
    "pruning.criterion": "criteria",
    "quantization.observer": "observers",
    "quantization.scheme.weights.kind": "grids",
    "distillation.losses": "losses",
    "distillation.hidden.loss": "losses",
    "distillation.attention.loss": "losses",
}


@dataclass(frozen=True)
class Setting:
    """One setting, as its config field describes it.

    Attributes:
        path: Its name with its section, such as "pruning.criterion".
        annotation: Its Python type, as text.
        default: What it is if it is not set, such as "default 0.5", with the value as YAML; or "required".
        doc: What it means.
        choices: The names that it may have as values, if they are registered or listed.
        keys: The names that its mapping may have as keys, if they are listed.
        inner: The config class of its own settings, if it has some.
    """

    path: str
    annotation: str
    default: str
    doc: str
    choices: Iterable[str | None] = ()
    keys: Iterable[str] = ()
    inner: type[SlimConfig] | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def summary(self) -> str:
        """The first sentence of what it means."""
        return re.split(r"(?<=\.)\s+(?=[A-Z`\d])", self.doc, maxsplit=1)[0]


def describe_settings(section: str | None = None) -> str:
    """What settings mean, as text for a terminal.

    Args:
        section: A section ("pruning"), a section within one ("distillation.hidden"), or one setting
            ("pruning.criterion", "training.learning_rate"). None: one line for every setting of every section.
    Raises: SlimError: if there is no such section or setting; names the nearest.
    """
    if section is None:
        return _overview()
    setting = _find(section)
    lines = _block(setting, with_names=setting.inner is None)
    if setting.inner is not None:
        about = inspect.getdoc(setting.inner) or ""
        lines += ["", *_wrapped(about, "  ")] if about != setting.doc else []
        for inner in settings_of(setting.inner, setting.path):
            lines += ["", *_block(inner)]
    return "\n".join(lines)


def settings_reference() -> dict[str, str]:
    """The Markdown pages of the reference: file name -> content; one page for every section of a recipe, and one for
    the recipe itself."""
    pages = {"recipe.md": _recipe_page()}
    for name, config in SECTIONS.items():
        pages[f"{name}.md"] = _section_page(name, config)
    return pages


def settings_of(config: type, section: str = "") -> list[Setting]:
    """The settings of a config class, in order.

    Args:
        section: Path of the section that the class describes; "" for the recipe itself.
    """
    docs, hints = field_docs(config), typing.get_type_hints(config)
    settings = [
        Setting(
            path=f"{section}.{field.name}".lstrip("."),
            annotation=_type_text(field.type),
            default=_default_text(field),
            doc=docs.get(field.name, field.metadata.get("help", "")),  # transformers keeps its texts as `help`
            choices=field.metadata.get("choices", ()),
            keys=field.metadata.get("keys", ()),
            inner=_config_in(hints[field.name]),
        )
        for field in dataclasses.fields(config)
        if field.init and field.name != "techniques"
    ]
    return settings + [_technique_setting(row) for row in TECHNIQUES] if config is Recipe else settings


def _technique_setting(row: Row) -> Setting:
    """The section of one technique."""
    return Setting(row.name, f"{row.config.__name__} | None", "default null", doc_of(row.config), inner=row.config)


def doc_of(entry: object) -> str:
    """The docstring of what is registered: of a criterion its score, of a grid its class, of a function its own."""
    if isinstance(entry, Criterion):
        entry = entry.score
    elif isinstance(entry, GridKind):
        entry = type(entry)
    return inspect.getdoc(entry) or "" if callable(entry) else ""


def _find(path: str) -> Setting:
    """The setting at a path. Raises SlimError if there is none."""
    siblings, found = settings_of(Recipe), None
    for number, name in enumerate(path.split(".")):
        by_name = {setting.name: setting for setting in siblings}
        if name not in by_name:
            raise SlimError(_no_such(path, path.split(".")[:number], name, by_name))
        found = by_name[name]
        siblings = _inside(found)
    return found


def _inside(setting: Setting) -> list[Setting]:
    if setting.path == TRAINING:
        return settings_of(TrainingArguments, TRAINING)
    return settings_of(setting.inner, setting.path) if setting.inner else []


def _no_such(path: str, parents: list[str], name: str, allowed: dict[str, Setting]) -> str:
    place = f"`{'.'.join(parents)}`" if parents else "A recipe"
    if not allowed:
        return f"{place} is one setting and has none inside, got '{path}'."
    elsewhere = [setting.path for setting in _all_settings() if setting.name == name]
    if elsewhere:
        return f"{place} has no setting '{name}'. Did you mean {' or '.join(elsewhere)}?"
    hint = nearest(name, allowed)
    if ".".join(parents) == TRAINING:  # over a hundred
        hint = hint.split("Allowed:")[0] + "Allowed: every argument of transformers.TrainingArguments."
    return f"{place} has no setting '{name}'. {hint}"


def _all_settings() -> Iterator[Setting]:
    """Every setting of a recipe and of its sections, each config class once."""
    seen: set[type] = set()
    waiting = settings_of(Recipe)
    while waiting:
        setting = waiting.pop(0)
        yield setting
        if setting.inner is not None and setting.inner not in seen:
            seen.add(setting.inner)
            waiting = settings_of(setting.inner, setting.path) + waiting


def _overview() -> str:
    lines = [
        "Every setting of a recipe, with its default. `hf-slim settings pruning` explains a section in full,",
        "`hf-slim settings pruning.criterion` one setting.",
        "",
    ]
    for setting in _all_settings():
        depth = setting.path.count(".")
        if not depth and setting.name not in BASICS:
            lines.append("")
        is_section = setting.inner is not None and setting.default in SECTION_DEFAULTS
        default = "" if is_section else f" ({setting.default.removeprefix('default ')})"
        first = f"{'  ' * depth}{setting.name}{default}"
        lines += _hanging(f"{first:<{COLUMN - 1}} {setting.summary}", COLUMN)
    return "\n".join(lines)


def _hanging(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def _block(setting: Setting, with_names: bool = False) -> list[str]:
    """A setting in full; `with_names` explains each of its names in a line of its own."""
    lines = [f"{setting.path}: {setting.annotation}, {setting.default}", *_wrapped(setting.doc, "  ")]
    names = _names(setting.choices)
    if names and not with_names:
        lines += _wrapped(f"Names: {', '.join(names)}.", "  ")
    if setting.keys:
        lines += _wrapped(f"Keys: {', '.join(setting.keys)}.", "  ")
    if names and with_names:
        lines += ["", *(line for name in names for line in _name_lines(name, setting.choices))]
    return lines


def _name_lines(name: str, choices: Iterable[str | None]) -> list[str]:
    doc = doc_of(choices[name]) if isinstance(choices, Registry) else ""
    first = " ".join(doc.partition("\n\n")[0].split())
    return _hanging(f"  {name:<18} {first}".rstrip(), 21)


def _recipe_page() -> str:
    lines = [
        "# Settings of a recipe",
        "",
        "A recipe is one YAML file. These pages are generated from the code; `hf-slim settings` prints the same",
        "texts. In Python write `None`, `True` and `False` for `null`, `true` and `false`, and pass a config or a",
        'dictionary to a callback: `PruningCallback({"sparsity": {"heads": 0.5}})`.',
        "",
    ]
    for setting in settings_of(Recipe):
        lines += _markdown(setting, "##", f"{setting.name}.md" if setting.name in SECTIONS else None)
    return "\n".join(lines).rstrip() + "\n"


def _section_page(name: str, config: type[SlimConfig]) -> str:
    lines = [f"# {name}", "", *_paragraphs(config)]
    lines += [f"Section `{name}` of a recipe; in Python `{config.__name__}`.", ""]
    waiting = [(setting, name) for setting in settings_of(config, name)]
    seen: dict[type, str] = {}
    while waiting:
        setting, root = waiting.pop(0)
        level = "#" * min(2 + setting.path.count(".") - root.count(".") - 1, 4)
        lines += _markdown(setting, level)
        if setting.inner in seen:
            lines += [f"Its settings are those of `{seen[setting.inner]}`.", ""]
        elif setting.inner is not None:
            seen[setting.inner] = setting.path
            lines += [*_paragraphs(setting.inner), f"In Python `{setting.inner.__name__}`.", ""]
            waiting = [(inner, root) for inner in settings_of(setting.inner, setting.path)] + waiting
    return "\n".join(lines).rstrip() + "\n"


def _markdown(setting: Setting, level: str, page: str | None = None) -> list[str]:
    title = setting.path if level == "##" and "." not in setting.path else setting.path.partition(".")[2]
    value = re.sub(r"^default (.*)$", r"default `\1`", setting.default)
    lines = [f"{level} {title}", "", f"`{setting.annotation}`, {value}", "", setting.doc, ""]
    if page is not None:
        lines += [f"See [{setting.name}]({page}).", ""]
    if names := _names(setting.choices):
        card = CARDS.get(setting.path)
        linked = [f"[{name}](../methods/{card}.md#{name})" if card else f"`{name}`" for name in names]
        lines += [f"Names: {', '.join(linked)}.", ""]
    if setting.keys:
        lines += [f"Keys: {', '.join(f'`{key}`' for key in setting.keys)}.", ""]
    return lines


def _paragraphs(config: type) -> list[str]:
    return [inspect.getdoc(config) or "", ""]


def _wrapped(text: str, indent: str) -> list[str]:
    """Paragraphs of text, wrapped."""
    options: dict[str, Any] = {"initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
    paragraphs = [textwrap.wrap(" ".join(part.split()), WIDTH, **options) for part in text.split("\n\n")]
    return [line for paragraph in paragraphs for line in paragraph]


def _names(choices: Iterable[str | None]) -> list[str]:
    return [name for name in choices if name is not None]


def _config_in(hint: Any) -> type[SlimConfig] | None:
    """The config class among the types of a setting, if any."""
    parts = [part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and part is not NoneType]
    return next((part for part in parts if issubclass(part, SlimConfig)), None)


def _type_text(annotation: Any) -> str:
    return re.sub(r"\w+\.(?=\w)|'", "", inspect.formatannotation(annotation))


def _default_text(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, SlimConfig):
        return "its own defaults"
    is_word = isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value)
    return f"default {value if is_word else json.dumps(value, default=str)}"
