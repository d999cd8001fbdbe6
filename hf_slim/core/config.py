"""The base of every config: a frozen dataclass that reads and writes strict JSON."""

import ast
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Hashable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from typing import Any, Self, TypeVar, cast

from hf_slim.core.errors import SlimConfigError, SlimError, nearest

Config = TypeVar("Config", bound="SlimConfig")


@dataclass(frozen=True)
class SlimConfig:
    """Base of all settings classes. Subclasses add fields and check their ranges in `__post_init__`.

    Every field has a docstring below it: its meaning, its allowed values, and the effect of its default. If the
    allowed values are names, they are in `field(metadata={"choices": names})`, and the keys of a mapping in `{"keys":
    names}`; both may be registries, which are read when the reference is made.
    """

    def __new__(cls, *values: Any, **settings: Any) -> Self:
        """Checks the names of settings before `__init__`, whose TypeError would not name the nearest valid one."""
        cls._check_names(settings)
        if values or settings:  # a copy is made without any
            cls._check_complete(settings, len(values))
        return super().__new__(cls)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # otherwise `dataclass` adds a hash that fails for lists and dictionaries
        cls.__hash__ = SlimConfig.__hash__  # type: ignore[method-assign]
        if "__post_init__" in vars(cls):
            checked = _with_checked_types(cls.__post_init__)
            setattr(cls, "__post_init__", checked)  # noqa: B010  an assignment would be no method for type checkers

    def __post_init__(self) -> None:
        """Checks the types of all fields; subclasses check more, and convert what they accept in another form."""
        self.check_types()

    def check_types(self) -> None:
        """Raises SlimConfigError for the first field whose value does not fit its type hint."""
        hints = typing.get_type_hints(type(self))
        for name, hint in ((f.name, hints[f.name]) for f in fields(self)):
            value = vars(self).get(name)
            if (wanted := type_problem(value, hint)) is not None:
                raise SlimConfigError(f"`{name}` must be {wanted}, got {value!r}.")

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
        cls._check_complete(values)
        return cls(**values)

    @classmethod
    def _check_complete(cls, names: Iterable[Any], given_by_position: int = 0) -> None:
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in needed[given_by_position:] if name not in names]
        if missing:
            raise SlimConfigError(f"{cls.__name__} needs `{missing[0]}`.")

    @classmethod
    def _check_names(cls, names: Iterable[Any]) -> None:
        allowed = [f.name for f in fields(cls)]
        for name in names:
            if name not in allowed:
                raise SlimConfigError(f"{cls.__name__} has no setting '{name}'. {nearest(str(name), allowed)}")

    @classmethod
    def of(cls: type[Config], config: "Config | dict[str, Any]") -> Config:
        """The given config, or a config built from a dictionary."""
        return config if isinstance(config, cls) else cls.from_dict(cast("dict[str, Any]", config))

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON types; `from_dict` restores an equal config."""
        return asdict(self)


def _with_checked_types(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The `__post_init__` of a config, and then a check of types.

    A config's own checks come first: they know more than a type. Where they fail on a value of a wrong type, that is
    what the error says.
    """

    @functools.wraps(check)
    def checked(self: SlimConfig) -> None:
        try:
            check(self)
        except SlimError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError):
            self.check_types()
            raise
        self.check_types()

    return checked


def field_docs(cls: type) -> dict[str, str]:
    """The docstring of every field of a dataclass, by name, in the order of its fields; one paragraph each.

    A field's docstring is the string literal below it, which editors show. Python does not keep it, so it is read from
    the source. Inherited fields are included; a subclass that declares a field again may document it again.

    Returns: name -> text, without fields that have no docstring; empty for a class whose source cannot be read.
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
    """A hashable form that is equal for equal values, also for lists and dictionaries."""
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
    Raises: SlimConfigError: if it is not; booleans are not accepted as numbers.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SlimConfigError(f"`{name}` must be a whole number of at least {least}, got {value!r}. {hint}".rstrip())


def type_problem(value: Any, hint: Any) -> str | None:
    """What a value of this type hint must be, in words, if `value` is something else; None if it fits.

    Lists and tuples stand for each other, whole numbers for numbers, and the keys of a mapping may be text, because
    JSON and YAML write them so. Hints of other classes are not checked.
    """
    return None if _fits(value, hint) else _in_words(hint)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and (not inner or all(_fits(item, inner[0]) for item in value))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, dict, list):
        return isinstance(value, hint)
    return not (isinstance(hint, type) and issubclass(hint, SlimConfig)) or isinstance(value, hint | dict)


WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null",
    dict: "a mapping", list: "a list",
}  # fmt: skip


def _in_words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(one) for one in inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple):
        return f"a list of {_in_words(inner[0])}" if inner else "a list"
    if origin is dict:
        return f"a mapping from names to {_in_words(inner[1])}"
    return WORDS.get(hint, "a mapping of settings")
