"""Finds, copies and replaces modules of any model, and changes their state for a while."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_slim.core.adapters import adapter_layers, adapter_parts
from hf_slim.core.contracts import PreparedHook, PreparedLayer
from hf_slim.core.errors import SlimError
from hf_slim.core.host import parameter_or_none

RECORD = "_hf_slim"  # attribute of a model with its `core.record.Record`


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode; its modes are restored on exit, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training  # one by one: some modules may be in evaluation mode while others train


@contextmanager
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Context with hooks that are removed on exit, also after an error.

    Args:
        handles: Handles of the hooks; a generator, so that if one cannot be registered, those before it are removed.
    """
    with ExitStack() as registered:
        for handle in handles:
            registered.callback(handle.remove)
        yield


@contextmanager
def temporary_module(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Context in which `module` is at the dotted path `name` of a model; the original is restored on exit.

    The module gets the training mode of the one that it replaces.
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
    """The device for inputs: that of the first weight that is not on the meta device, as offloaded weights are."""
    placed = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(placed, torch.device("cpu"))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The current dtype of autocast on this type of device; None if autocast is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_recomputing() -> bool:
    """Whether this forward pass repeats an earlier one within a backward pass, as gradient checkpointing does."""
    return torch._C._current_graph_task_id() != -1


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
    """A deep copy without the changes of `prepare`: fake-quantized modules are plain ones again.

    Hooks of a prepared model (`PreparedHook`) are not copied.
    """
    twin = copy.deepcopy(model)
    prepared = [(name, module) for name, module in twin.named_modules() if isinstance(module, PreparedLayer)]
    for name, module in prepared:
        set_module_(twin, name, module.plain())
    remove_prepared_hooks_(twin)
    twin.__dict__.pop(RECORD, None)
    return twin


def remove_prepared_hooks_(model: nn.Module, kinds: tuple[type, ...] = (PreparedHook,)) -> None:
    """Removes the forward hooks that are an instance of one of `kinds`, or a method of one."""
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
    """Every integer attribute of the modules, such as a number of heads: (module path, attribute) -> value.

    Fields of a module's config are called "config.x". Adapters are skipped.
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
    """Sets one of `counts`; a field of a config is set in a copy of the config for this module."""
    target: object = module
    if attribute.startswith("config."):
        module.config = target = copy.copy(module.config)
        attribute = attribute.removeprefix("config.")
    setattr(target, attribute, value)


def _numbers(values: dict[str, Any], kinds: tuple[type, ...]) -> list[tuple[str, int | float]]:
    return [(name, value) for name, value in values.items() if type(value) in kinds and not name.startswith("_")]


def resolve(model: nn.Module, name: str) -> str | None:
    """The path of a saved module in this model, with or without the base model's prefix; None if there is none.

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
    """Raises SlimError if a weight has NaN or infinite values, which no grid can represent."""
    if not torch.isfinite(tensor).all():
        raise SlimError(
            f"The weight of '{name}' has NaN or infinite values, which no grid can represent. "
            "Check the checkpoint, lower the learning rate, or add the layer to `ignore`."
        )
