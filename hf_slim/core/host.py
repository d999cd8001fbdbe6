"""Reads optional parts of host objects (models, configs, outputs, layers) by the names that their libraries use."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def config_of(model: nn.Module) -> Any | None:
    """The config object of a Transformers model or of one of its modules; None for any other module."""
    return getattr(model, "config", None)


def config_value(model: nn.Module, name: str, default: Any = None) -> Any:
    """A field of the model's config; `default` if there is no config or no such field."""
    return field_of(config_of(model), name, default)


def field_of(config: object, name: str, default: Any = None) -> Any:
    """A field of a config, or an attribute of a model or its output; `default` if there is none of this name."""
    return getattr(config, name, default)


def text_config_of(model: nn.Module) -> Any | None:
    """The text part of a model's config; None for a module without a Transformers config."""
    config = config_of(model)
    find = method_or_none(config, "get_text_config")
    return config if find is None else find()


def main_input_name(model: nn.Module) -> str | None:
    """The main keyword argument of a Transformers model's forward, such as "input_ids"; None for other modules."""
    return getattr(model, "main_input_name", None)


def method_or_none(host: object, name: str) -> Callable[..., Any] | None:
    """A method of a host library's object, such as `get_encoder` of a model; None if it has none of this name."""
    return getattr(host, name, None)


def parameter_or_none(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module, such as its bias; None if it has none of this name."""
    return getattr(module, name, None)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is GPT-2's `Conv1D`: a linear layer whose weight is stored as `(in_features, out_features)`."""
    return {"nf", "nx"} <= vars(module).keys()
