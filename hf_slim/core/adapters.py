"""Finds adapters such as LoRA's: which modules belong to the model, and which to its adapters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_slim.core.host import method_or_none

BASE = "base_layer"  # PEFT's attribute for the layer that an adapter wraps


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that wrap a layer to adapt it, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(getattr(m, BASE, None), nn.Module)}


def adapter_parts(model: nn.Module) -> set[str]:
    """Names of the modules that belong to an adapter and not to the model: all parts of an adapter but its base."""
    parts: set[str] = set()
    for name, adapter in adapter_layers(model).items():
        base = {f"{name}.{inner}".rstrip(".") for inner in (BASE, *_prefixed(adapter))}
        parts |= {f"{name}.{inner}" for inner, _ in adapter.named_modules() if inner} - base
    return parts


def without_adapters(path: str) -> str:
    """The path of a module or tensor after adapters are merged."""
    return ".".join(part for part in path.split(".") if part != BASE)


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Context in which a PEFT model, or one adapted layer, runs without its adapters; restored on exit.

    PEFT makes every adapter trainable when it enables them again; here frozen parameters remain frozen.

    Args:
        module: A `PeftModel`, or one of the modules that `adapter_layers` finds.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        disable = method_or_none(module, "disable_adapter")  # a method of PEFT's models, not of its layers
        with disable() if disable is not None else _layer_disabled(module):
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _layer_disabled(layer: nn.Module) -> Iterator[None]:
    adapted: Any = layer
    were_disabled = adapted.disable_adapters
    try:
        adapted.enable_adapters(False)
        yield
    finally:
        adapted.enable_adapters(not were_disabled)


def _prefixed(adapter: nn.Module) -> list[str]:
    return [f"{BASE}.{inner}" for inner, _ in getattr(adapter, BASE).named_modules() if inner]
