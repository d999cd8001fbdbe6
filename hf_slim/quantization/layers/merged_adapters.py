"""LoRA on a fake-quantized base: the forward sees the rounded sum of both, which is what merging will ship.

Works on any adapter layer that holds its `base_layer` and tells its change of the weight by `get_delta_weight`, as
PEFT's LoRA layers do. Dropout of an adapter is not applied: a merged weight has none.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.adapters import BASE, adapter_layers
from hf_slim.core.modules import set_module_
from hf_slim.quantization.layers.training import FakeQuantLinear


def simulate_merged_(model: nn.Module) -> None:
    """Lets every adapter around a fake-quantized layer act through that layer's weight, before it is rounded."""
    for adapter in adapter_layers(model).values():
        base = adapter.get_submodule(BASE)
        if isinstance(base, FakeQuantLinear) and hasattr(adapter, "get_delta_weight"):
            base.weight_change = types.MethodType(_pending_change, adapter)
            adapter.forward = types.MethodType(_forward_base, adapter)


@torch.no_grad()
def merge_adapters_(model: nn.Module) -> None:
    """Puts every adapter's base layer in the adapter's place, holding the sum of both as its float weight.

    Exact also where the base is stored in four bits: nothing is rounded on the way.
    """
    for name, adapter in adapter_layers(model).items():
        base = adapter.get_submodule(BASE)
        if isinstance(base, FakeQuantLinear):
            base.weight = nn.Parameter(base.merged_weight().detach().clone(), requires_grad=False)
            base.weight_change = base.read_weight = None
        elif not adapter.merged:
            adapter.merge()
        set_module_(model, name, base)


def _pending_change(adapter: nn.Module) -> Tensor | None:
    if adapter.disable_adapters or adapter.merged:
        return None
    changes = [adapter.get_delta_weight(name) for name in adapter.active_adapters if name in adapter.lora_A]
    return sum(changes) if changes else None


def _forward_base(adapter: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return adapter.get_submodule(BASE)(input)
