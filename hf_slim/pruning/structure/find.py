"""Finds the prunable groups of a model from its modules, and verifies them on a copy without weights."""

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_slim.core.adapters import adapter_parts
from hf_slim.core.errors import SlimError
from hf_slim.core.host import parameter_or_none
from hf_slim.pruning.config import KINDS
from hf_slim.pruning.groups import GroupSet, Refusal, Slice, common_ancestor
from hf_slim.pruning.matrices import is_channelwise, matrix_of
from hf_slim.pruning.structure.depth import BLOCKS, block_sets, layer_sets
from hf_slim.pruning.structure.example_inputs import example_inputs
from hf_slim.pruning.structure.experts import expert_sets
from hf_slim.pruning.structure.hidden_width import hidden_sets
from hf_slim.pruning.structure.patterns import Pattern, Run, find_pattern
from hf_slim.pruning.structure.probe import FAILURES, Output, Probe, run_cut, weightless_twin
from hf_slim.pruning.structure.proof import removable_blocks, removable_layers
from hf_slim.pruning.structure.sizes import with_sizes

# neurons outside the stacks, as in poolers and classifiers: a config cannot prune them, but they change with others
UNSTACKED = "unstacked"


def find_group_sets(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> list[GroupSet]:
    """All prunable group sets of `model`, in the order of its forward pass; `understand` without the refusals."""
    return understand(model, inputs)[0]


def understand(
    model: nn.Module, inputs: dict[str, Tensor] | None = None, kinds: Collection[str] = KINDS
) -> tuple[list[GroupSet], list[Refusal]]:
    """The prunable group sets, and the reasons why other layers have none.

    Args:
        model: Any module, also on the meta device.
        inputs: Keyword arguments of a forward pass, one short example; None: a dummy example from the model's config.
        kinds: Kinds of groups to find; each takes time to verify.
    Returns: group sets in the order of the forward pass, and a sentence for every part that cannot be pruned.
    Raises: SlimError: if the model cannot be run on such inputs.
    """
    with torch.random.fork_rng(devices=[]):  # random numbers of the probe must not change the state of the run
        torch.manual_seed(0)
        found, refusals = _understand(model, inputs or example_inputs(model), {*kinds})
    return [group_set for group_set in found if group_set.kind in kinds], refusals


def _understand(model: nn.Module, inputs: dict[str, Tensor], kinds: set[str]) -> tuple[list[GroupSet], list[Refusal]]:
    twin = weightless_twin(model)
    try:
        probe = run_cut(twin, inputs)
    except FAILURES as error:
        raise SlimError(
            f"The structure of {type(model).__name__} was not understood: its layers could not be run one by one on "
            f"an input of {', '.join(inputs)} ({str(error).splitlines()[0]}). It uses weights in an unusual way."
        ) from error
    patterns = [pattern for reading in probe.readings if (pattern := find_pattern(probe, reading))]
    adapters = adapter_parts(model)
    patterns = [pattern for pattern in patterns if any(output.layer not in adapters for output in pattern.rows)]
    found, reasons = [], []
    for family in _families(patterns):
        reason = _why_not(family)
        if reason is None:
            found += _group_sets(model, family)
        elif reason:
            reasons.append(Refusal("kv_heads" if family[0].block > 1 else "ffn", reason))
    found += expert_sets(model)
    streams, no_streams = hidden_sets(model, probe) if "hidden" in kinds else ([], [])
    inside = {part for part, blocks in BLOCKS.items() if blocks in kinds}
    wanted = _distinct([group_set for group_set in found + streams if group_set.kind in kinds | inside])
    found, failed = with_sizes(twin, probe, wanted)
    parts, no_parts = _depth_sets(model, twin, probe, found, kinds)
    return _distinct(found + parts), reasons + no_streams + failed + no_parts


def _depth_sets(
    model: nn.Module, twin: nn.Module, probe: Probe, found: list[GroupSet], kinds: set[str]
) -> tuple[list[GroupSet], list[Refusal]]:
    """Blocks and whole layers that can be removed, and the reasons why others cannot."""
    sets, refusals = [], []
    for blocks in block_sets(model, found):
        if blocks.kind in kinds and (difference := removable_blocks(twin, probe, blocks)):
            refusals.append(Refusal(blocks.kind, f"Parts of '{blocks.name}' cannot be removed: {difference}"))
        elif blocks.kind in kinds:
            sets.append(blocks)
    for stack in layer_sets(model, probe) if "layers" in kinds else ():
        removable, difference = removable_layers(twin, probe, stack)
        if removable:
            sets.append(removable)
        else:
            refusals.append(Refusal("layers", f"Layers of '{stack.stack}' cannot be removed: {difference}"))
    return sets, refusals


def _families(patterns: list[Pattern]) -> list[list[Pattern]]:
    """Families of patterns that share an output, so the same groups must be removed: T5's heads share a bias."""
    families: list[list[Pattern]] = []
    for pattern in patterns:
        layers = _layers(pattern)
        related = [family for family in families if any(layers & _layers(other) for other in family)]
        families = [family for family in families if family not in related]
        families.append([member for family in related for member in family] + [pattern])
    return families


def _layers(pattern: Pattern) -> set[str]:
    """The layers that write or read the channels of a pattern; a layer that is called twice is one layer."""
    return {f"{pattern.reading.layer}, read", *(output.layer for output in pattern.rows)}


def _why_not(family: list[Pattern]) -> str | None:
    """None if the family can be pruned; otherwise the reason, or "" if no reason needs to be reported."""
    if any(output.is_stream for pattern in family for output in pattern.rows) or _is_stream_like(family):
        return ""
    for pattern in family:
        if pattern.reason:
            return pattern.reason
    rows: dict[str, list[Run]] = {}
    for pattern in family:
        for output, runs in pattern.rows.items():
            if rows.setdefault(output.layer, runs) != runs or pattern.count != family[0].count:
                return f"'{pattern.reading.layer}' and '{family[0].reading.layer}' read '{output.layer}' differently"
    return None if family[0].count > 1 else ""


def _is_stream_like(family: list[Pattern]) -> bool:
    """Whether a layer of the family mixes all channels that the others read one by one, as a stream without norms."""
    return (
        any(
            pattern.reason
            and any(len(runs) == 1 and runs[0][1] == output.channels for output, runs in pattern.rows.items())
            for pattern in family
        )
        and len(family) > 1
    )


def _group_sets(model: nn.Module, family: list[Pattern]) -> Iterator[GroupSet]:
    consumers = [pattern.reading.layer for pattern in family]
    producers = [output.layer for pattern in family for output in pattern.rows]
    layer = common_ancestor([*producers, *consumers])
    kind = _kind(model, family)
    if kind == "ffn" and not _is_repeated(model, layer):
        kind = UNSTACKED
    yield GroupSet(f"{layer}/{kind}".strip("/"), kind, family[0].count, tuple(_slices(model, family)))
    if kind == "kv_heads" and family[0].per_group > 1 and all(pattern.own_rows for pattern in family):
        slices = tuple(_query_slices(model, family))
        yield GroupSet(f"{layer}/heads", "heads", family[0].blocks, slices, balance=family[0].per_group)


def _kind(model: nn.Module, family: list[Pattern]) -> str:
    layers = [model.get_submodule(output.layer) for pattern in family for output in pattern.rows]
    if any(matrix_of(layer).channels != -1 for layer in layers if matrix_of(layer)):
        return "channels"
    if all(length == 1 for pattern in family for runs in pattern.rows.values() for _, length in runs):
        return "ffn"
    return "heads" if family[0].is_shared else "kv_heads"  # a single key-value head is kept


def _is_repeated(model: nn.Module, layer: str) -> bool:
    """Whether a layer is part of a stack; True for all layers of a model without stacks."""
    has_stacks = any(isinstance(module, nn.ModuleList) and len(module) for module in model.modules())
    return not has_stacks or any(part.isdigit() for part in layer.split("."))


def _slices(model: nn.Module, family: list[Pattern]) -> Iterator[Slice]:
    seen: set[str] = set()
    for pattern in family:
        for output, runs in pattern.rows.items():
            if output.layer not in seen:
                seen.add(output.layer)
                for start, length in runs:
                    yield from _written(model, output.layer, length, start)
    for pattern in family:
        yield from _read(model, pattern.reading.layer, pattern.block * pattern.per_group, seen)


def _query_slices(model: nn.Module, family: list[Pattern]) -> Iterator[Slice]:
    """Slices of single query heads; weights that belong to the whole key-value group are kept."""
    seen: set[str] = set()
    for pattern in family:
        whole = {output: sum(length for _, length in runs) for output, runs in pattern.rows.items()}
        for output, runs in pattern.own_rows.items():
            if output.layer in seen:
                continue
            seen.add(output.layer)
            for start, length in runs:
                # heads of one group are adjacent; keys and values of the group may come before the next
                layout = {"period": pattern.per_group, "stride": _stride(pattern, output, start, whole[output])}
                yield from _written(model, output.layer, length, start, **layout)
    for pattern in family:
        yield from _read(model, pattern.reading.layer, pattern.block, seen)


def _stride(pattern: Pattern, output: Output, start: int, whole: int) -> int:
    return next((length for first, length in pattern.rows[output] if first <= start < first + length), whole)


def _written(model: nn.Module, layer: str, width: int, offset: int, **layout: int) -> Iterator[Slice]:
    module = model.get_submodule(layer)
    yield Slice(f"{layer}.weight", matrix_of(module).out_dim, width, offset, **layout)
    if parameter_or_none(module, "bias") is not None:
        yield Slice(f"{layer}.bias", 0, width, offset, **layout)


def _read(model: nn.Module, layer: str, width: int, seen: set[str]) -> Iterator[Slice]:
    module = model.get_submodule(layer)
    if is_channelwise(module):
        for name in ("weight", "bias", "running_mean", "running_var"):
            if parameter_or_none(module, name) is not None and f"{layer}.{name}" not in seen:
                seen.add(f"{layer}.{name}")
                yield Slice(f"{layer}.{name}", 0, width)
    elif layer not in {entry.removesuffix("/in") for entry in seen if entry.endswith("/in")}:
        seen.add(f"{layer}/in")
        yield Slice(f"{layer}.weight", matrix_of(module).in_dim, width, reads=True)


def _distinct(found: list[GroupSet]) -> list[GroupSet]:
    """Gives sets with the same name, in the same part of the model, the name of the first layer that reads them."""
    names = [group_set.name for group_set in found]
    return [
        group_set
        if names.count(group_set.name) == 1
        else replace(group_set, name=f"{_reader(group_set)}/{group_set.kind}")
        for group_set in found
    ]


def _reader(group_set: GroupSet) -> str:
    return next((part.module for part in group_set.slices if part.reads), group_set.slices[-1].module)
