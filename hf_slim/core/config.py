"""The base of every config: a frozen dataclass that reads and writes strict JSON."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Hashable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from typing import Any, Self, TypeVar, cast

from hf_slim.core.errors import SlimConfigError, nearest

Config = TypeVar("Config", bound="SlimConfig")


@dataclass(frozen=True)
class SlimConfig:
    """A technique's settings. Subclasses add fields and check their ranges in `__post_init__`.

    Under every field stands its docstring: what it means, which values are allowed, what its default does. Where the
    allowed values are names, `field(metadata={"choices": names})` holds them, and `{"keys": names}` the keys of a
    mapping; both may be registries, which are read when the reference is made.
    """

    def __new__(cls, *values: Any, **settings: Any) -> Self:
        """Refuses unknown settings before `__init__`, whose TypeError would not name the nearest valid one."""
        cls._check_names(settings)
        return super().__new__(cls)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # otherwise `dataclass` adds one, which fails for lists and dictionaries
        cls.__hash__ = SlimConfig.__hash__  # type: ignore[method-assign]

    def __hash__(self) -> int:
        return hash((type(self), *(_hashable(getattr(self, f.name)) for f in fields(self))))

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The config that `values` describes.

        Raises: SlimConfigError: on an unknown key, with the nearest valid one, and on a required one that is missing.
        """
        if not isinstance(values, dict):
            raise SlimConfigError(
                f"{cls.__name__} needs a mapping of settings, got {type(values).__name__}: {values!r}."
            )
        cls._check_names(values)
        required = (f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)
        if missing := [name for name in required if name not in values]:
            raise SlimConfigError(f"{cls.__name__} needs `{missing[0]}`, got {values!r}.")
        return cls(**values)

    @classmethod
    def _check_names(cls, names: Iterable[Any]) -> None:
        allowed = [f.name for f in fields(cls)]
        for name in names:
            if name not in allowed:
                raise SlimConfigError(f"{cls.__name__} has no setting '{name}'. {nearest(str(name), allowed)}")

    @classmethod
    def of(cls: type[Config], config: "Config | dict[str, Any]") -> Config:
        """`config` itself, or built from a dictionary: what every callback accepts."""
        return config if isinstance(config, cls) else cls.from_dict(cast("dict[str, Any]", config))

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON types; `from_dict` restores an equal config."""
        return asdict(self)


def field_docs(cls: type) -> dict[str, str]:
    """The docstring of every field of a dataclass, by name, in the order of its fields; one paragraph each.

    A field's docstring is the string literal under it, which editors show. Python does not keep it, so it is read from
    the source. Inherited fields are included; a subclass that declares a field again may document it again.

    Returns: name -> text. Fields without a docstring are left out, and so are all fields of a class without source,
        such as one typed into an interpreter.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _docs_in_source(base)
    return {f.name: found[f.name] for f in fields(cls) if f.name in found}


@cache
def _docs_in_source(cls: type) -> dict[str, str]:
    """The docstrings under the annotations in the body of one class, inherited ones not included."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
    found: dict[str, str] = {}
    for statement, below in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                found[statement.target.id] = " ".join(text.split())
    return found


def _hashable(value: Any) -> Hashable:
    """The same for equal values; lists and dictionaries included."""
    if isinstance(value, dict):
        return frozenset((key, _hashable(inner)) for key, inner in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def require_share(name: str, value: Any, upper_open: bool = False) -> None:
    """Checks that `value` is a share in [0, 1], or [0, 1) with `upper_open`. Raises SlimConfigError otherwise."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (upper_open and value == 1):
        end = ")" if upper_open else "]"
        hint = f" For {value}% write {value / 100}." if is_number and 1 < value <= 100 else ""
        raise SlimConfigError(f"`{name}` must be in [0, 1{end}, got {value!r}: it is a share, not a percentage.{hint}")


def require_whole(name: str, value: Any, least: int = 1, hint: str = "") -> None:
    """Checks that `value` is a whole number of at least `least`.

    Args:
        hint: A sentence that ends the message, such as what to set instead.
    Raises: SlimConfigError: if it is anything else; `True` is not a number here.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SlimConfigError(f"`{name}` must be a whole number of at least {least}, got {value!r}. {hint}".rstrip())
