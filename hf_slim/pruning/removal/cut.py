"""Removes masked groups: `W (n x m)` becomes `W' (n x m')`."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_slim.core.adapters import BASE
from hf_slim.core.contracts import PreparedLayer, set_kept_columns_
from hf_slim.core.errors import SlimError
from hf_slim.core.modules import set_count_
from hf_slim.pruning.groups import GroupSet, tensor_of, without_blocks
from hf_slim.pruning.matrices import reads_along, set_sizes_
from hf_slim.pruning.removal.layers import remove_layers_
from hf_slim.pruning.removal.optimizer_state import forget_others_, replace_parameter_

Removed = dict[str, list[int]]  # group set name -> indices of its groups


@torch.no_grad()
def remove_groups_(
    model: nn.Module, group_sets: list[GroupSet], removed: Removed, optimizer: Optimizer | None = None
) -> None:
    """Removes groups from every layer, in place; the function of the masked model does not change.

    Args:
        optimizer: Continues with the smaller parameters; its state becomes smaller in the same way.
    Raises: SlimError: if a removed group is not zero, because its removal would change the model.
    """
    for group_set in group_sets:
        _check_zero(model, group_set, removed.get(group_set.name, []))
    cut_out_(model, group_sets, removed, optimizer)
    if optimizer is not None:
        forget_others_(optimizer, model)


def cut_out_(
    model: nn.Module, group_sets: Sequence[GroupSet], removed: Removed, optimizer: Optimizer | None = None
) -> None:
    """`remove_groups_` without the check that the groups are zero. Needs memory for a copy of one tensor."""
    group_sets, removed = without_blocks(group_sets, removed)
    for paths, cuts in _cuts_per_tensor(model, group_sets, removed):
        old = tensor_of(model, paths[0])
        new = old
        for dim, places in cuts.items():
            kept = kept_places(new.shape[dim], places).to(new.device)
            for path in paths:
                _keep_in_quantizers_(model, path, dim, kept)
            new = _without(new, dim, kept)
        for path in paths:
            _put_(model, path, new)
        if optimizer is not None and isinstance(old, nn.Parameter):
            replace_parameter_(optimizer, old, new, {dim: kept_places(old.shape[dim], p) for dim, p in cuts.items()})
    for group_set in group_sets:
        if indices := removed.get(group_set.name):
            _shrink_attributes_(model, group_set, group_set.count - len(indices))
    for group_set in group_sets:  # last, because the names of later layers change
        if group_set.stack and removed.get(group_set.name):
            remove_layers_(model, group_set, removed[group_set.name])


def _cuts_per_tensor(
    model: nn.Module, group_sets: Sequence[GroupSet], removed: Removed
) -> list[tuple[list[str], dict[int, Tensor]]]:
    """For every tensor that becomes smaller: its paths (several if it is tied), and removed indices by dimension."""
    paths_of: dict[int, list[str]] = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for path, tensor in tensors:
            paths_of.setdefault(id(tensor), []).append(path)
    cuts: dict[int, dict[int, list[Tensor]]] = {}
    for group_set in group_sets:
        indices = removed.get(group_set.name, [])
        for part in group_set.slices if indices else ():
            if not part.only_zeroed:
                places = part.places(indices).flatten()
                cuts.setdefault(id(tensor_of(model, part.tensor)), {}).setdefault(part.dim, []).append(places)
    return [(paths_of[key], {dim: torch.cat(found) for dim, found in dims.items()}) for key, dims in cuts.items()]


def kept_places(count: int, removed: Tensor) -> Tensor:
    """The indices below `count` that are not in `removed`, ascending."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[removed.cpu()] = False
    return kept.nonzero().squeeze(1)


def _without(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    rest = tensor.detach().index_select(dim, kept)
    return nn.Parameter(rest, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rest


def _put_(model: nn.Module, path: str, tensor: Tensor) -> None:
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    setattr(module, name, tensor)
    set_sizes_(module)
    adapter, _, part = module_path.rpartition(".")
    if part == BASE and hasattr(module, "in_features"):
        wrapper = model.get_submodule(adapter)
        wrapper.in_features, wrapper.out_features = module.in_features, module.out_features


def _keep_in_quantizers_(model: nn.Module, path: str, dim: int, kept: Tensor) -> None:
    module_path, _, name = path.rpartition(".")
    layer = model.get_submodule(module_path)
    if isinstance(layer, PreparedLayer):
        if name in layer.columns and reads_along(layer, dim):
            layer.keep_columns_(name, layer.columns[name] * len(kept) // tensor_of(model, path).shape[dim])
        if name == "weight" and dim == 0:
            layer.keep_rows_(name, kept)
    set_kept_columns_(layer, None)


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
                "trained after the mask was set. In your own training loop, call `zero_groups_` after every optimizer "
                "step, as PruningCallback does."
            )
