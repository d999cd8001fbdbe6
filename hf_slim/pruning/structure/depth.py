"""Whole layers, and the attention or feed-forward parts of layers."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from hf_slim.core.host import config_value, parameter_or_none
from hf_slim.pruning.groups import GroupSet, Slice
from hf_slim.pruning.matrices import is_experts, matrix_of
from hf_slim.pruning.structure.probe import Probe

DOWN = "down_proj"
BLOCKS = {
    "kv_heads": "attention_blocks",
    "heads": "attention_blocks",
    "ffn": "ffn_blocks",
}  # kind of groups -> of parts


def layer_sets(model: nn.Module, probe: Probe) -> Iterator[GroupSet]:
    """One set per stack of layers; group `i` has all weights of layer `i` that write into the residual stream."""
    reaching = probe.reaching_result()
    writers = [output.layer for output in probe.outputs if output.is_stream or output in reaching]
    for path, stack in _stacks(model):
        slices = [
            part
            for index in range(len(stack))
            for layer in dict.fromkeys(writers)
            if layer.startswith(f"{path}.{index}.")
            for part in _written_by(model, layer, index)
        ]
        if {part.only for part in slices} == set(range(len(stack))):
            yield GroupSet(f"{path}/layers", "layers", len(stack), tuple(slices), stack=path)


def block_sets(model: nn.Module, found: Sequence[GroupSet]) -> Iterator[GroupSet]:
    """One set per stack and kind of part; group `i` is all heads, or all neurons, of one layer.

    The output of such a part is a sum over its groups; with all groups removed it adds zero to the residual stream.
    """
    for path, _ in _stacks(model):
        roles: dict[str, list[GroupSet]] = {}  # part of a name after the number of the layer -> one set per layer
        for group_set in found:
            match = re.match(rf"{re.escape(path)}\.\d+(.*)", group_set.name)
            has_all = group_set.kind in BLOCKS and not group_set.balance
            if match and has_all and not is_experts(model.get_submodule(group_set.slices[0].module)):
                roles.setdefault(match[1], []).append(group_set)
        kinds = [BLOCKS[parts[0].kind] for parts in roles.values()]
        for kind, (role, parts) in zip(kinds, roles.items(), strict=True):
            if len(parts) > 1:
                owner = role.rpartition("/")[0] if kinds.count(kind) > 1 else ""
                slices = tuple(part for index, inner in enumerate(parts) for part in _all_of(model, inner, index))
                # a cache reads its length from the keys of the first layer
                pinned = (0,) if kind == "attention_blocks" and config_value(model, "use_cache") is not None else ()
                name = f"{path}{owner}/{kind}"
                yield GroupSet(name, kind, len(parts), slices, pinned=pinned, parts=tuple(parts))


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of layers, without those inside a layer."""
    found: list[str] = []
    for path, module in model.named_modules():
        is_inner = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not is_inner:
            found.append(path)
            yield path, module


def _all_of(model: nn.Module, group_set: GroupSet, index: int) -> Iterator[Slice]:
    """All indices of a set as one group, and the biases of its readers, which would still have an effect."""
    for part in group_set.slices:
        yield replace(part, width=part.width * group_set.count, only=index)
        bias = f"{part.module}.bias"
        if part.reads and parameter_or_none(model.get_submodule(part.module), "bias") is not None:
            yield Slice(bias, 0, len(model.get_submodule(part.module).bias), only=index, only_zeroed=True)


def _written_by(model: nn.Module, layer: str, index: int) -> Iterator[Slice]:
    module = model.get_submodule(layer)
    if is_experts(module):
        weight = module.get_parameter(DOWN)
        yield Slice(f"{layer}.{DOWN}", 1, weight.shape[1], only=index, only_zeroed=True)
        return
    dim = matrix_of(module).out_dim
    yield Slice(f"{layer}.weight", dim, module.weight.shape[dim], only=index, only_zeroed=True)
    if parameter_or_none(module, "bias") is not None:
        yield Slice(f"{layer}.bias", 0, len(module.bias), only=index, only_zeroed=True)
