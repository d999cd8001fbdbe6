"""Settings of a recipe, from the fields and docstrings of its configs."""

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

from transformers import TrainingArguments

from hf_slim.core.config import SlimConfig, field_docs
from hf_slim.core.errors import SlimConfigError, nearest
from hf_slim.core.registry import Registry
from hf_slim.integration.techniques import TECHNIQUES, Row
from hf_slim.pruning.importance.criteria import Criterion
from hf_slim.quantization.grids.grid import GridKind
from hf_slim.recipe import Recipe

TRAINING = "training"  # the section whose settings are those of transformers


@dataclass(frozen=True)
class Setting:
    """One setting, as its config field describes it.

    Attributes:
        path: Its name with its section, such as "pruning.criterion".
        annotation: Its Python type, as text.
        default: Its default, such as "default 0.5", with the value as YAML; or "required".
        doc: Its explanation.
        choices: Allowed values, if they are registered or listed names.
        keys: Allowed keys of its mapping, if they are listed.
        inner: Config class of the settings inside it, if there are any.
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
        """Its name without the section."""
        return self.path.rpartition(".")[2]

    @property
    def names(self) -> list[str]:
        """The `choices` without None, which switches the setting off."""
        names = [name for name in self.choices if name is not None]
        return sorted(names) if isinstance(self.choices, Registry) else names  # a registry has no fixed order

    @property
    def summary(self) -> str:
        """The first sentence of its explanation."""
        return re.split(r"(?<=\.)\s+(?=[A-Z`\d])", self.doc, maxsplit=1)[0]


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
            doc=docs.get(field.name, field.metadata.get("help", "")),  # transformers has its texts in `help`
            choices=field.metadata.get("choices", ()),
            keys=field.metadata.get("keys", ()),
            inner=_config_in(hints[field.name]),
        )
        for field in dataclasses.fields(config)
        if field.init and field.name != "techniques"
    ]
    return settings + [_technique_setting(row) for row in TECHNIQUES] if config is Recipe else settings


def all_settings() -> Iterator[Setting]:
    """Every setting of a recipe and of its sections, each config class once."""
    seen: set[type] = set()
    waiting = settings_of(Recipe)
    while waiting:
        setting = waiting.pop(0)
        yield setting
        if setting.inner is not None and setting.inner not in seen:
            seen.add(setting.inner)
            waiting = settings_of(setting.inner, setting.path) + waiting


def find_setting(path: str) -> Setting:
    """The setting at a path. Raises SlimConfigError if there is none."""
    siblings, found = settings_of(Recipe), None
    for number, name in enumerate(path.split(".")):
        by_name = {setting.name: setting for setting in siblings}
        if name not in by_name:
            raise SlimConfigError(_no_such(path, path.split(".")[:number], name, by_name))
        found = by_name[name]
        siblings = _inside(found)
    return found


def doc_of(entry: object) -> str:
    """The docstring of a registered entry: of a criterion's score function, of a grid's class, or of a function."""
    if isinstance(entry, Criterion):
        entry = entry.score
    elif isinstance(entry, GridKind):
        entry = type(entry)
    return inspect.getdoc(entry) or "" if callable(entry) else ""


def paragraphs_of(config: type) -> list[str]:
    """The docstring of a config class, each paragraph in one line."""
    return [" ".join(part.split()) for part in (inspect.getdoc(config) or "").split("\n\n")]


def _technique_setting(row: Row) -> Setting:
    """The section of one technique."""
    about = paragraphs_of(row.config)[0]
    return Setting(row.name, f"{row.config.__name__} | None", "default null", about, inner=row.config)


def _inside(setting: Setting) -> list[Setting]:
    if setting.path == TRAINING:
        return settings_of(TrainingArguments, TRAINING)
    return settings_of(setting.inner, setting.path) if setting.inner else []


def _no_such(path: str, parents: list[str], name: str, allowed: dict[str, Setting]) -> str:
    place = f"`{'.'.join(parents)}`" if parents else "A recipe"
    if not allowed:
        return f"{place} is one setting and has none inside, got '{path}'."
    elsewhere = [setting.path for setting in all_settings() if setting.name == name]
    if elsewhere:
        return f"{place} has no setting '{name}'. Did you mean {' or '.join(elsewhere)}?"
    hint = nearest(name, allowed)
    if ".".join(parents) == TRAINING:  # over a hundred
        hint = hint.split("Allowed:")[0] + "Allowed: every argument of transformers.TrainingArguments."
    return f"{place} has no setting '{name}'. {hint}"


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
