"""The base of every config: a frozen dataclass that reads and writes strict JSON."""

from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from hf_slim.core.errors import SlimError, nearest

Config = TypeVar("Config", bound="SlimConfig")


@dataclass(frozen=True)
class SlimConfig:
    """A technique's settings. Subclasses add fields with `metadata={"help": ...}` and check their own ranges."""

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The config that `values` describes. Raises SlimError on an unknown key and names the nearest valid one."""
        if not isinstance(values, dict):
            raise SlimError(f"{cls.__name__} needs a mapping of settings, got {type(values).__name__}: {values!r}.")
        allowed = [f.name for f in fields(cls)]
        for key in values:
            if key not in allowed:
                raise SlimError(f"{cls.__name__} has no setting '{key}'. {nearest(str(key), allowed)}")
        return cls(**values)

    @classmethod
    def of(cls: type[Config], config: "Config | dict[str, Any]") -> Config:
        """`config` itself, or built from a dictionary: what every callback accepts."""
        return config if isinstance(config, cls) else cls.from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON types; `from_dict` restores an equal config."""
        return asdict(self)


def require_share(name: str, value: Any, upper_open: bool = False) -> None:
    """Checks that `value` is a share in [0, 1], or [0, 1) with `upper_open`. Raises SlimError otherwise."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (upper_open and value == 1):
        end = ")" if upper_open else "]"
        hint = f" For {value}% write {value / 100}." if is_number and 1 < value <= 100 else ""
        raise SlimError(f"`{name}` must be in [0, 1{end}, got {value!r}: it is a share, not a percentage.{hint}")
