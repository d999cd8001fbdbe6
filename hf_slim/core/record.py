"""The record that hf_slim keeps on a model, with one state object per technique."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from hf_slim.core.config import SlimConfig
from hf_slim.core.host import method_or_none
from hf_slim.core.modules import RECORD

State = TypeVar("State")


@dataclass
class Record:
    """The techniques that were applied to a model; an attribute of the model that is never saved.

    Attributes:
        configs: Technique name -> config, for techniques that are prepared and not yet converted.
        applied: Technique name -> config as JSON, for all techniques that were converted; written to config.json.
        run: The current training run: any object that its callbacks share, such as the Trainer's state.
        running: Names of the techniques whose callbacks take part in `run` and have not finished.
        states: Type -> the state object of a technique; see `state_of`.
        base_sizes: `parameters` and `ram_bytes` of the model before anything was prepared.
    """

    configs: dict[str, SlimConfig] = field(default_factory=dict)
    applied: dict[str, dict[str, Any]] = field(default_factory=dict)
    run: object | None = None
    running: set[str] = field(default_factory=set)
    states: dict[type, Any] = field(default_factory=dict)
    base_sizes: dict[str, int] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model takes part in no run."""
        return vars(self) | {"run": None, "running": set()}


def record_of(model: nn.Module) -> Record:
    """The model's record, created empty on first use."""
    model = unwrapped(model)
    if RECORD not in model.__dict__:
        model.__dict__[RECORD] = Record()
    return model.__dict__[RECORD]


def state_of(model: nn.Module, kind: type[State]) -> State:
    """The state object of a technique for this model, created with its defaults on first use.

    Args:
        kind: The technique's state class; every field has a default.
    """
    return record_of(model).states.setdefault(kind, kind())


def forget_state_(model: nn.Module, kind: type) -> None:
    """Deletes the state object of a technique, for example after the model is converted."""
    record_of(model).states.pop(kind, None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside an adapter wrapper such as PEFT's, or the model itself, so that layer names have no prefix."""
    inner = method_or_none(model, "get_base_model")
    return model if inner is None else inner()


def is_prepared(model: nn.Module, technique: str | None = None) -> bool:
    """Whether `technique`, or any technique, is prepared and not yet converted."""
    configs = record_of(model).configs
    return technique in configs if technique else bool(configs)
