"""Verifies that a structure was understood: removing groups must give the same result as zeroing them.

Groups of every set are removed from a copy without weights. All inputs of layers in the smaller copy must be equal,
channel by channel, to those in the full copy in which these groups are zero.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_slim.pruning.groups import GroupSet, without_blocks
from hf_slim.pruning.removal.cut import Removed, cut_out_, kept_places
from hf_slim.pruning.removal.layers import remove_layers_, renamed
from hf_slim.pruning.removal.masked_norms import mask_norms_
from hf_slim.pruning.structure.depth import DOWN
from hf_slim.pruning.structure.probe import FAILURES, Probe, Reading, module_copy, run_cut


def _difference(twin: nn.Module, probe: Probe, sets: list[GroupSet]) -> str:
    """The difference between removing groups of every set and zeroing them; "": none.

    With equal numbers everywhere, a dependency between two sets could not be found. So for any two sets there is a
    round in which different numbers of groups are removed from them.
    """
    for bit in range(max(1, (len(sets) - 1).bit_length())):
        removed = {
            group_set.name: _some_groups(group_set, 1 + (index >> bit & 1)) for index, group_set in enumerate(sets)
        }
        difference = _difference_of(twin, probe, sets, removed)
        if difference:
            return difference
    return ""


def _difference_of(twin: nn.Module, probe: Probe, sets: list[GroupSet], removed: Removed) -> str:
    whole_twin = twin
    if any(group_set.masked_norms for group_set in sets):
        whole_twin = module_copy(twin)
        mask_norms_(whole_twin, sets, removed)
    sets, removed = without_blocks(sets, removed)
    removed_channels = _RemovedChannels(sets, removed)
    masked, smaller = _fixed_outputs(probe, removed_channels)
    small_twin = module_copy(twin)
    cut_out_(small_twin, sets, removed)
    try:
        whole, rest = run_cut(whole_twin, probe.inputs, masked), run_cut(small_twin, probe.inputs, smaller)
    except FAILURES as error:
        return f"without one group its forward pass fails ({str(error).splitlines()[0]})"
    if [reading.layer for reading in whole.readings] != [reading.layer for reading in rest.readings]:
        return "without one group other layers run"
    for before, after in zip(whole.readings, rest.readings, strict=True):
        if not _is_same(_kept_channels(before, removed_channels), after.value):
            return f"the input of '{before.layer}' changes if a group is removed instead of zeroed"
    return "" if _is_same(whole.result, rest.result) else "the output of the model would lose channels"


def _some_groups(group_set: GroupSet, number: int) -> list[int]:
    if group_set.balance:
        number = min(number, group_set.balance - 1)
        return [first + inner for first in range(0, group_set.count, group_set.balance) for inner in range(number)]
    number = min(number * group_set.multiple, group_set.count - 1) // group_set.multiple * group_set.multiple
    start = (group_set.count - number) // 2
    return list(range(start, start + number))


def _fixed_outputs(probe: Probe, removed_channels: "_RemovedChannels") -> tuple[dict, dict]:
    """Outputs of the layers with the removed groups zero, and without them: layer -> one tensor per call."""
    masked: dict[str, list[Tensor]] = {}
    smaller: dict[str, list[Tensor]] = {}
    for output in probe.outputs:
        value, dim = output.value.detach(), output.value.dim() + output.dim
        places = removed_channels.of(output.layer, reads=False)
        kept = kept_places(output.channels, places)
        masked.setdefault(output.layer, []).append(value.index_fill(dim, places, 0) if len(places) else value)
        smaller.setdefault(output.layer, []).append(value.index_select(dim, kept) if len(places) else value)
    return masked, smaller


def removable_layers(twin: nn.Module, probe: Probe, stack: GroupSet) -> tuple[GroupSet | None, str]:
    """The set of whole layers in a form in which removing layers equals masking them; None and the reason otherwise.

    Three forms are tried: all layers can be removed; all except the first, on which others depend (T5); all layers,
    with masked ones bypassed.
    """
    differences = []
    for form in (stack, replace(stack, pinned=(0,)), replace(stack, bypassed=True)):
        differences.append(_depth_difference(twin, probe, form))
        if not differences[-1]:
            return form, ""
    return None, differences[0]


def removable_blocks(twin: nn.Module, probe: Probe, blocks: GroupSet) -> str:
    """The difference between removing every second block and zeroing it; "": none."""
    readers = (part.module for part in blocks.slices if part.reads)
    if odd := next((path for path in readers if not isinstance(twin.get_submodule(path), nn.Linear)), None):
        return f"'{odd}' is not a linear layer, so its inputs cannot be removed"
    free = [index for index in range(blocks.count) if index not in blocks.pinned]
    differences = (
        _difference_of(twin, probe, [blocks], {blocks.name: half}) for half in (free[::2], free[1::2]) if half
    )
    return next(filter(None, differences), "")


def _depth_difference(twin: nn.Module, probe: Probe, stack: GroupSet) -> str:
    for removed in (list(range(0, stack.count, 2)), list(range(1, stack.count, 2))):
        removed = [index for index in removed if index not in stack.pinned]
        writers = {part.module for part in stack.slices if part.only in removed}
        masked: dict[str, list[Tensor]] = {}
        smaller: dict[str, list[Tensor]] = {}
        for output in probe.outputs:
            value = output.value.detach()
            masked.setdefault(output.layer, []).append(torch.zeros_like(value) if output.layer in writers else value)
            if name := renamed(output.layer, stack, removed):
                smaller.setdefault(name, []).append(value)
        whole_twin, small_twin = module_copy(twin), module_copy(twin)
        mask_norms_(whole_twin, [stack], {stack.name: removed})
        remove_layers_(small_twin, stack, removed)
        try:
            whole, rest = run_cut(whole_twin, probe.inputs, masked), run_cut(small_twin, probe.inputs, smaller)
        except FAILURES as error:
            return f"without some layers its forward pass fails ({str(error).splitlines()[0]})"
        before = [reading.value for reading in whole.readings if renamed(reading.layer, stack, removed)]
        after = [reading.value for reading in rest.readings]
        if len(before) != len(after) or not all(map(_is_same, [*before, whole.result], [*after, rest.result])):
            return "its layers do not only add to a residual stream: without one the inputs of the others change"
    return ""


def _is_same(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and torch.allclose(before.float(), after.float(), rtol=1e-3, atol=1e-4)


def _kept_channels(reading: Reading, removed_channels: "_RemovedChannels") -> Tensor:
    places = removed_channels.of(reading.layer, reads=True)
    if not len(places):
        return reading.value
    return reading.value.index_select(reading.value.dim() + reading.dim, kept_places(reading.channels, places))


class _RemovedChannels:
    """The removed channels of every layer: those it reads, and those it writes."""

    def __init__(self, sets: list[GroupSet], removed: Removed):
        self._places: dict[tuple[str, bool], list[Tensor]] = {}
        for group_set in sets:
            norms = {part.module for part in group_set.slices if part.tensor.endswith(".running_mean")}
            for part in group_set.slices if removed.get(group_set.name) else ():
                # the outputs of fused experts are the rows of their last matrix
                if part.tensor.endswith(".weight") or (part.tensor.endswith(f".{DOWN}") and part.dim == 1):
                    places = part.places(removed[group_set.name]).flatten()
                    for reads in (True, False) if part.module in norms else (part.reads,):
                        self._places.setdefault((part.module, reads), []).append(places)

    def of(self, layer: str, reads: bool) -> Tensor:
        places = self._places.get((layer, reads))
        return torch.cat(places) if places else torch.empty(0, dtype=torch.long)
