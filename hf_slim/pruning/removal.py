"""Masked groups disappear: `W (n x m)` becomes `W' (n x m')`."""

import torch
from torch import nn

from hf_slim.core.errors import SlimError
from hf_slim.pruning.groups import GroupSet, bias_blocks, weight_blocks
from hf_slim.pruning.mask import Removed, kept_indices


@torch.no_grad()
def remove_groups_(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> None:
    """Cuts the removed groups out of every layer, in place; the function of the masked model stays.

    Raises: SlimError: if a removed group is not zero, because its removal would change the model.
    """
    for group_set in group_sets:
        indices = removed.get(group_set.name, [])
        if not indices:
            continue
        _check_zero(model, group_set, indices)
        for part in group_set.slices:
            layer = model.get_submodule(part.module)
            kept = kept_indices(group_set.count, indices, part.width, layer.weight.device)
            _keep_(layer, part.dim, kept)
        for path, attribute, per_group in group_set.attributes:
            setattr(model.get_submodule(path), attribute, per_group * (group_set.count - len(indices)))


def _keep_(layer: nn.Linear, dim: int, kept: torch.Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight.index_select(dim, kept), layer.weight.requires_grad)
    if dim == 0:
        layer.out_features = len(kept)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[kept], layer.bias.requires_grad)
        if hasattr(layer, "keep_rows_"):  # a fake-quantized layer may hold a scale for each row
            layer.keep_rows_(kept)
    else:
        layer.in_features = len(kept)
        layer.kept_columns = None


def _check_zero(model: nn.Module, group_set: GroupSet, indices: list[int]) -> None:
    for block in weight_blocks(model, group_set) + bias_blocks(model, group_set):
        if block[indices].any():
            raise SlimError(
                f"Groups {indices[:5]} of '{group_set.name}' are marked for removal but are not zero: they were "
                "trained after the mask was set. In a training loop of your own call `zero_groups_` after every "
                "optimizer step, as PruningCallback does."
            )
