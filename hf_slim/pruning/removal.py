"""Masked groups disappear: `W (n x m)` becomes `W' (n x m')`."""

import operator

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.modules import set_count_
from hf_slim.pruning.depth import remove_layers_
from hf_slim.pruning.groups import GroupSet, tensor_of
from hf_slim.pruning.layers import reads_along, set_sizes_

Removed = dict[str, list[int]]  # group set name -> indices of its groups


@torch.no_grad()
def remove_groups_(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> None:
    """Cuts the removed groups out of every layer, in place; the function of the masked model stays.

    Raises: SlimError: if a removed group is not zero, because its removal would change the model.
    """
    for group_set in group_sets:
        _check_zero(model, group_set, removed.get(group_set.name, []))
    cut_out_(model, group_sets, removed)


def cut_out_(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> None:
    """`remove_groups_` without looking whether the groups are zero."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for group_set in group_sets:
        indices = removed.get(group_set.name, [])
        if indices:
            for part in group_set.slices:
                if part.only is None:
                    gone.setdefault((part.tensor, part.dim), []).append(part.places(indices).flatten())
            _shrink_attributes_(model, group_set, group_set.count - len(indices))
    smaller: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # tied tensors stay tied; the old ones keep their ids
    for (path, dim), places in gone.items():
        tensor = tensor_of(model, path)
        if (id(tensor), dim) not in smaller:
            kept = kept_places(tensor.shape[dim], torch.cat(places)).to(tensor.device)
            smaller[id(tensor), dim] = tensor, _without(tensor, dim, kept)
            _tell_quantizers_(model, path, dim, kept)
        _put_(model, path, smaller[id(tensor), dim][1])
    for group_set in group_sets:  # last, because the layers behind change their names
        if group_set.stack and removed.get(group_set.name):
            remove_layers_(model, group_set, removed[group_set.name])


def kept_places(count: int, gone: Tensor) -> Tensor:
    """The indices below `count` that are not in `gone`, ascending."""
    stays = torch.ones(count, dtype=torch.bool)
    stays[gone.cpu()] = False
    return stays.nonzero().squeeze(1)


def _without(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    rest = tensor.detach().index_select(dim, kept)
    return nn.Parameter(rest, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rest


def _put_(model: nn.Module, path: str, tensor: Tensor) -> None:
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    setattr(module, name, tensor)
    set_sizes_(module)


def _tell_quantizers_(model: nn.Module, path: str, dim: int, kept: Tensor) -> None:
    module_path, _, name = path.rpartition(".")
    layer = model.get_submodule(module_path)
    columns = getattr(layer, "columns", None)
    if columns and name in columns and reads_along(layer, dim):  # how a fake-quantized layer lays its weights out
        layer.columns = columns | {name: columns[name] * len(kept) // tensor_of(model, path).shape[dim]}
    if name == "weight" and dim == 0 and hasattr(layer, "keep_rows_"):
        layer.keep_rows_(kept)  # a fake-quantized layer may hold a scale for each row
    if hasattr(layer, "kept_columns"):
        layer.kept_columns = None


def _shrink_attributes_(model: nn.Module, group_set: GroupSet, left: int) -> None:
    for path, attribute in group_set.attributes:
        module = model.get_submodule(path)
        value = operator.attrgetter(attribute)(module)
        set_count_(module, attribute, value * left // group_set.count)


def _check_zero(model: nn.Module, group_set: GroupSet, indices: list[int]) -> None:
    for part in group_set.slices if indices else ():
        tensor = tensor_of(model, part.tensor)
        places = part.places(indices).flatten().to(tensor.device)
        if isinstance(tensor, nn.Parameter) and tensor.detach().index_select(part.dim, places).any():
            raise SlimError(
                f"Groups {indices[:5]} of '{group_set.name}' are marked for removal but are not zero: they were "
                "trained after the mask was set. In a training loop of your own call `zero_groups_` after every "
                "optimizer step, as PruningCallback does."
            )
