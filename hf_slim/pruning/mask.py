"""Keeping groups at zero until they are removed."""

import torch
from torch import Tensor, nn

from hf_slim.pruning.groups import GroupSet, tensor_of
from hf_slim.pruning.layers import matrix_of
from hf_slim.pruning.removal import Removed, kept_places


@torch.no_grad()
def zero_groups_(model: nn.Module, group_sets: list[GroupSet], removed: Removed, readers_only: bool = False) -> None:
    """Sets every weight and bias of the removed groups to zero, so that they no longer act.

    Args:
        readers_only: Zero only what reads the groups, which silences them as well and lets them come back.
    """
    for group_set in group_sets:
        indices = torch.tensor(removed.get(group_set.name, []), dtype=torch.long)
        for part in group_set.slices if len(indices) else ():
            if part.reads or not readers_only:
                tensor = tensor_of(model, part.tensor)
                kept = torch.ones(tensor.shape[part.dim], dtype=tensor.dtype)
                kept[part.places(indices).flatten()] = 0
                # a product runs through memory in order, which filling columns one by one does not
                tensor.mul_(kept.to(tensor.device).view(-1, *[1] * (tensor.dim() - part.dim - 1)))


def mark_kept_columns_(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> None:
    """Tells every reading layer which of its columns will remain, as `kept_columns`.

    A quantization grid that groups columns must group them as the smaller layer will.
    """
    gone: dict[str, list[Tensor]] = {}
    for group_set in group_sets:
        for part in group_set.slices:
            if part.reads and matrix_of(model.get_submodule(part.module)):
                gone.setdefault(part.module, []).append(part.places(removed.get(group_set.name, [])).flatten())
    for path, places in gone.items():
        layer = model.get_submodule(path)
        columns = layer.weight.shape[matrix_of(layer).in_dim]
        dropped = torch.cat(places)
        layer.kept_columns = kept_places(columns, dropped).to(layer.weight.device) if len(dropped) else None
