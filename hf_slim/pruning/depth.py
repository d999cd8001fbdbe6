"""Whole layers: a layer whose outputs into the residual stream are zero may go."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_slim.pruning.groups import GroupSet, Slice
from hf_slim.pruning.layers import is_experts, matrix_of
from hf_slim.pruning.probe import Probe

LAYER_COUNT = re.compile(r"(num|n)_.*layers?$|(en|de)coder_layers$")  # how configs call the length of a stack
DOWN = "down_proj"


def layer_sets(model: nn.Module, probe: Probe) -> Iterator[GroupSet]:
    """One set per stack of layers; group `i` is layer `i`, with all that it writes into the residual stream."""
    shown = probe.shown()
    writers = [output.layer for output in probe.outputs if output.is_stream or output in shown]
    for path, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or len(stack) < 2:
            continue
        slices = [
            part
            for index in range(len(stack))
            for layer in dict.fromkeys(writers)
            if layer.startswith(f"{path}.{index}.")
            for part in _written_by(model, layer, index)
        ]
        if {part.only for part in slices} == set(range(len(stack))):
            yield GroupSet(f"{path}/layers", "layers", len(stack), tuple(slices), stack=path)


def remove_layers_(model: nn.Module, group_set: GroupSet, removed: list[int]) -> None:
    """Takes layers out of their stack and tells everybody who counts them."""
    stack = model.get_submodule(group_set.stack)
    kept = [index for index in range(len(stack)) if index not in removed]
    for new, old in enumerate(kept):
        for module in stack[old].modules():
            if vars(module).get("layer_idx") == old:  # its place in the cache
                module.layer_idx = new
    parent, _, name = group_set.stack.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(stack[index] for index in kept))
    for config in _configs(model):
        _shrink_config_(config, group_set, kept)


def renamed(path: str, group_set: GroupSet, removed: list[int]) -> str | None:
    """What a module is called once layers are gone; None if it went with them."""
    head = f"{group_set.stack}."
    if not path.startswith(head):
        return path
    index, _, rest = path.removeprefix(head).partition(".")
    if int(index) in removed:
        return None
    return f"{head}{int(index) - sum(gone < int(index) for gone in removed)}.{rest}".rstrip(".")


def _written_by(model: nn.Module, layer: str, index: int) -> Iterator[Slice]:
    module = model.get_submodule(layer)
    if is_experts(module):
        weight = getattr(module, DOWN)
        yield Slice(f"{layer}.{DOWN}", 1, weight.shape[1], only=index)
        return
    dim = matrix_of(module).out_dim
    yield Slice(f"{layer}.weight", dim, module.weight.shape[dim], only=index)
    if getattr(module, "bias", None) is not None:
        yield Slice(f"{layer}.bias", 0, len(module.bias), only=index)


def _configs(model: nn.Module) -> list[Any]:
    """Every config object in the model, once."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())


def _shrink_config_(config: Any, group_set: GroupSet, kept: list[int]) -> None:
    in_decoder = "decoder" in group_set.stack
    counters = [name for name, value in vars(config).items() if LAYER_COUNT.match(name) and value == group_set.count]
    named = [name for name in counters if ("decoder" in name) == in_decoder]
    for name in named or counters:
        setattr(config, name, len(kept))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == group_set.count and name.endswith(("layer_types", "_layers")):
            setattr(config, name, [value[index] for index in kept])
