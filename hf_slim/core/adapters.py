"""Adapters around layers, such as LoRA's: which modules belong to the model, and which to its adapters."""

from torch import nn

BASE = "base_layer"  # where PEFT keeps the layer that an adapter wraps


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that wrap a layer to adapt it, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(getattr(m, BASE, None), nn.Module)}


def adapter_parts(model: nn.Module) -> set[str]:
    """Names of the modules that belong to an adapter and not to the model: what lies beside a base layer."""
    parts: set[str] = set()
    for name, adapter in adapter_layers(model).items():
        base = {f"{name}.{inner}".rstrip(".") for inner in (BASE, *_prefixed(adapter))}
        parts |= {f"{name}.{inner}" for inner, _ in adapter.named_modules() if inner} - base
    return parts


def without_adapters(path: str) -> str:
    """The path that a module or tensor has once adapters are merged."""
    return ".".join(part for part in path.split(".") if part != BASE)


def _prefixed(adapter: nn.Module) -> list[str]:
    return [f"{BASE}.{inner}" for inner, _ in getattr(adapter, BASE).named_modules() if inner]
