"""The base of every config: a frozen dataclass that reads and writes strict JSON."""

from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, TypeVar

from hf_slim.core.errors import SlimConfigError, nearest

Config = TypeVar("Config", bound="SlimConfig")


@dataclass(frozen=True)
class SlimConfig:
    """A technique's settings. Subclasses add fields with `metadata={"help": ...}` and check their own ranges."""

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

        Raises: SlimConfigError: on an unknown key, with the nearest valid one.
        """
        if not isinstance(values, dict):
            raise SlimConfigError(
                f"{cls.__name__} needs a mapping of settings, got {type(values).__name__}: {values!r}."
            )
        cls._check_names(values)
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
        return config if isinstance(config, cls) else cls.from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON types; `from_dict` restores an equal config."""
        return asdict(self)


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
