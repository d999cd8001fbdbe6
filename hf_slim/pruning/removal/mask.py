"""Masks groups: keeps them at zero until they are removed."""

import torch
from torch import Tensor, nn

from hf_slim.core.contracts import set_kept_columns_
from hf_slim.pruning.groups import GroupSet, Slice, tensor_of
from hf_slim.pruning.matrices import reads_along
from hf_slim.pruning.removal.cut import Removed, kept_places


@torch.no_grad()
def zero_groups_(model: nn.Module, group_sets: list[GroupSet], removed: Removed, readers_only: bool = False) -> None:
    """Sets every weight and bias of the removed groups to zero, so that they have no effect.

    Args:
        readers_only: Zero only the weights that read the groups. They have no effect then either, and can regrow.
    """
    for group_set in group_sets:
        indices = torch.tensor(removed.get(group_set.name, []), dtype=torch.long)
        for part in group_set.slices if len(indices) else ():
            if part.reads or not readers_only:
                tensor = tensor_of(model, part.tensor)
                kept = torch.ones(tensor.shape[part.dim], dtype=tensor.dtype)
                kept[part.places(indices).flatten()] = 0
                # a product accesses memory sequentially, which is faster than setting single columns
                tensor.mul_(kept.to(tensor.device).view(-1, *[1] * (tensor.dim() - part.dim - 1)))


def mark_kept_columns_(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> None:
    """Sets `kept_columns` of every layer from which columns are removed, by name of the tensor.

    A quantization grid with groups of columns must form the groups of the smaller layer.
    """
    removed_at: dict[str, dict[tuple[str, int], list[Tensor]]] = {}
    for group_set in group_sets:
        for part in group_set.slices:
            if _cuts_columns(model.get_submodule(part.module), part):
                key = (part.tensor.rpartition(".")[2], part.dim)
                places = part.places(removed.get(group_set.name, [])).flatten()
                removed_at.setdefault(part.module, {}).setdefault(key, []).append(places)
    for path, tensors in removed_at.items():
        layer = model.get_submodule(path)
        dropped = {key: torch.cat(places) for key, places in tensors.items()}
        kept = {name: _kept_columns(getattr(layer, name), dim, at) for (name, dim), at in dropped.items() if len(at)}
        set_kept_columns_(layer, kept)


def _cuts_columns(module: nn.Module, part: Slice) -> bool:
    """Whether a slice contains columns of a weight matrix: its inputs, or the channels of an embedding."""
    is_vector = part.tensor.endswith(".bias")
    return not is_vector and (reads_along(module, part.dim) or (isinstance(module, nn.Embedding) and part.dim == 1))


def _kept_columns(tensor: Tensor, dim: int, dropped: Tensor) -> Tensor:
    kept = kept_places(tensor.shape[dim], dropped).to(tensor.device)
    size = tensor[0, 0].numel() if dim == 1 else 1  # every position of a convolution kernel is a column
    return (kept.unsqueeze(1) * size + torch.arange(size, device=kept.device)).flatten()
