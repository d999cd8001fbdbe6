"""Finding, replacing and resizing modules of any model."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_slim.core.adapters import adapter_layers, adapter_parts
from hf_slim.core.contracts import PreparedHook, PreparedLayer
from hf_slim.core.errors import SlimError

RECORD = "_hf_slim"  # where `core.lifecycle` keeps what it has done to a model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards as it was, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training  # one by one: a part may be kept in evaluation mode while the rest trains


def config_of(model: nn.Module) -> Any | None:
    """The config object of a Transformers model or of one of its modules; None for any other module."""
    return getattr(model, "config", None)


def config_value(model: nn.Module, name: str, default: Any = None) -> Any:
    """A field of the model's config; `default` where there is no config or no such field."""
    return field_of(config_of(model), name, default)


def field_of(config: object, name: str, default: Any = None) -> Any:
    """A field of a config object, or of what a model returns; `default` where it has none of this name."""
    return getattr(config, name, default)


def text_config_of(model: nn.Module) -> Any | None:
    """The part of a model's config that is about text; None for a module without a Transformers config."""
    config = config_of(model)
    find = method_or_none(config, "get_text_config")
    return config if find is None else find()


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is GPT-2's `Conv1D`: a linear layer whose weight is stored as `(in_features, out_features)`."""
    return {"nf", "nx"} <= vars(module).keys()


def parameter_or_none(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module, such as its bias; None where it has none of this name or it is switched off."""
    return getattr(module, name, None)


def method_or_none(host: object, name: str) -> Callable[..., Any] | None:
    """A method of a host library's object, such as `get_encoder` of a model; None where it has none of this name."""
    return getattr(host, name, None)


def main_input_name(model: nn.Module) -> str | None:
    """The keyword argument that a Transformers model reads first, such as "input_ids"; None for any other module."""
    return getattr(model, "main_input_name", None)


@contextmanager
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed in the end, also after an exception.

    Args:
        handles: What registering them returns; a generator, so that those before one that fails are removed as well.
    """
    with ExitStack() as registered:
        for handle in handles:
            registered.callback(handle.remove)
        yield


@contextmanager
def temporary_module(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """A model with `module` at the dotted path `name`, and afterwards with its own one again, also after an exception.

    The module takes over the training mode of the one it replaces.
    """
    own = model.get_submodule(name)
    modes = [(part, part.training) for part in own.modules()]
    try:
        set_module_(model, name, module)
        yield
    finally:
        set_module_(model, name, own)
        for part, training in modes:
            part.training = training


def sizes_of(model: nn.Module) -> dict[str, int]:
    """`parameters` and `ram_bytes` (buffers included) of a model that is not packed; shared ones are counted once."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in parameters + buffers)
    return {"parameters": sum(parameter.numel() for parameter in parameters), "ram_bytes": size}


def device_of(model: nn.Module) -> torch.device:
    """Where inputs go: the place of the first weight that has one, since offloaded weights have none."""
    placed = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(placed, torch.device("cpu"))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes matrix products in on this kind of device now; None where autocast is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def set_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted path `name`, in the training mode of the one it replaces."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module.train(parent.get_submodule(child).training)
    setattr(parent, child, module)


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Modules that share their `weight` with an earlier one: later name -> first name."""
    first: dict[int, str] = {}
    tied = {}
    for name, module in model.named_modules():
        weight = parameter_or_none(module, "weight")
        if isinstance(weight, Tensor):
            owner = first.setdefault(id(weight), name)
            if owner != name:
                tied[name] = owner
    return tied


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy with every fake-quantized module back in its plain form: the model as if never prepared.

    Hooks that belong to a prepared model (`PreparedHook`) are left out.
    """
    twin = copy.deepcopy(model)
    prepared = [(name, module) for name, module in twin.named_modules() if isinstance(module, PreparedLayer)]
    for name, module in prepared:
        set_module_(twin, name, module.plain())
    remove_prepared_hooks_(twin)
    twin.__dict__.pop(RECORD, None)
    return twin


def remove_prepared_hooks_(model: nn.Module, kinds: tuple[type, ...] = (PreparedHook,)) -> None:
    """Removes forward hooks that are a `PreparedHook`, or a method of one; with `kinds`, only of these classes."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                owner = getattr(hook, "__self__", hook)
                if isinstance(owner, kinds):
                    del hooks[key]
        for flags in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
            for key in [key for key in flags if key not in module._forward_hooks]:
                del flags[key]


def counts(model: nn.Module, kinds: tuple[type, ...] = (int,)) -> dict[tuple[str, str], int | float]:
    """Every whole number a module holds about itself, such as its head count: (module path, attribute) -> value.

    Those of a config that the module holds are called "config.x"; adapters are passed over.
    """
    found: dict[tuple[str, str], int | float] = {}
    adapters = {*adapter_layers(model), *adapter_parts(model)}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and name not in adapters:
            found |= {(name, attribute): value for attribute, value in _numbers(vars(module), kinds)}
        config = vars(module).get("config")
        if config is not None:
            found |= {(name, f"config.{attribute}"): value for attribute, value in _numbers(vars(config), kinds)}
    return found


def set_count_(module: nn.Module, attribute: str, value: int | float) -> None:
    """Sets one of `counts`; a field of a config in a copy for this module alone."""
    target: object = module
    if attribute.startswith("config."):
        module.config = target = copy.copy(module.config)
        attribute = attribute.removeprefix("config.")
    setattr(target, attribute, value)


def _numbers(values: dict[str, Any], kinds: tuple[type, ...]) -> list[tuple[str, int | float]]:
    return [(name, value) for name, value in values.items() if type(value) in kinds and not name.startswith("_")]


def resolve(model: nn.Module, name: str) -> str | None:
    """The path of a saved module in this model, with or without the base model's prefix; None if it has no such part.

    A checkpoint of `LlamaForCausalLM` calls a layer `model.layers.0`, `LlamaModel` calls it `layers.0`.
    """
    prefix = getattr(model, "base_model_prefix", "")
    candidates = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
    for candidate in candidates:
        try:
            model.get_submodule(candidate)
            return candidate
        except AttributeError:
            continue
    return None


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises SlimError if a weight holds NaN or infinity, which no grid can represent."""
    if not torch.isfinite(tensor).all():
        raise SlimError(
            f"The weight of '{name}' holds NaN or infinite values, which no grid can hold. "
            "Check the checkpoint, lower the learning rate, or add the layer to `ignore`."
        )
