"""LoRA on a fake-quantized base: the forward pass uses the rounded sum of both, as the merged model will.

Works for any adapter layer that has `base_layer` and `get_delta_weight`, such as PEFT's LoRA layers. Dropout of an
adapter is not applied, because a merged weight has none.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.adapters import BASE, adapter_layers
from hf_slim.core.modules import set_module_
from hf_slim.quantization.layers.training import FakeQuantLinear


def simulate_merged_(model: nn.Module) -> None:
    """Makes every adapter of a fake-quantized layer add its change to that layer's weight before rounding."""
    for adapter in adapter_layers(model).values():
        base = adapter.get_submodule(BASE)
        if isinstance(base, FakeQuantLinear) and hasattr(adapter, "get_delta_weight"):
            base.weight_change = types.MethodType(_pending_change, adapter)
            adapter.forward = types.MethodType(_forward_base, adapter)


@torch.no_grad()
def merge_adapters_(model: nn.Module) -> None:
    """Replaces every adapter by its base layer, whose float weight becomes the sum of both.

    Exact even if the base is stored in four bits: the sum is not rounded back to four bits.
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
