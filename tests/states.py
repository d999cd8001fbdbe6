"""The state of a model beside its weights, models in a state of their own, and errors that come in between."""

import peft
import torch
from torch import nn

from hf_slim import QuantizationConfig, prepare
from hf_slim.core.record import record_of
from hf_slim.pruning.state import PruningState
from hf_slim.quantization.layers.scale_holders import quantizers
from tests import tiny


class Broken(Exception):
    """An error that nothing in hf_slim expects."""


def breaking(model: nn.Module, calls: int) -> nn.Module:
    """`model`, whose second layer of a kind fails in its forward pass number `calls`, counted from 1."""
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    left = [calls]

    def fail(module: nn.Module, *given: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise Broken

    stack[1].register_forward_pre_hook(fail)
    return model


def in_mixed_modes(model: nn.Module) -> nn.Module:
    """`model` in training mode, one part of it in evaluation mode, one weight frozen, some quantizers off."""
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0].eval()
    next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    for quantizer in list(quantizers(model))[:2]:
        quantizer.enabled = False
    return model


def state_of(model: nn.Module) -> dict[str, object]:
    """Modes, hooks, parts, frozen weights, quantizers, gradients and configs of a model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    record = record_of(model)
    pruning = record.states.get(PruningState, PruningState())
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "parts": {name: id(module) for name, module in model.named_modules()},
        "hooks": {
            (name, kind): list(vars(module)[kind].values())
            for name, module in model.named_modules()
            for kind in vars(module)
            if kind.endswith("_hooks") and vars(module)[kind]
        },
        "attributes": {
            name: {attribute for attribute, value in vars(module).items() if value is not None}
            for name, module in model.named_modules()
        },
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name for name, parameter in model.named_parameters() if parameter.grad is not None},
        "enabled": [quantizer.enabled for quantizer in quantizers(model)],
        "adapters off": [module.disable_adapters for module in model.modules() if hasattr(module, "lora_A")],
        "generation config": id(getattr(inner, "generation_config", None)),
        "record": (dict(record.configs), dict(pruning.removed), pruning.plan),
    }


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def raise_broken(*given: object) -> None:
    raise Broken


def check_and_break(holds: bool) -> None:
    assert holds
    raise Broken


def rounded() -> nn.Module:
    return prepare(tiny.llama(), QuantizationConfig("w3a16", initialize="gptq"))


def lora() -> nn.Module:
    settings = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    return peft.get_peft_model(tiny.llama(tie_word_embeddings=False), settings)
