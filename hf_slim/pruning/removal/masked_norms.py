"""Hooks for masked models: modules that mix all groups get only the kept groups, and masked layers are bypassed.

A norm over the hidden width divides by its number of channels, and a router chooses among all experts. With zeros in
their weights, a masked group would still have an effect. So they compute as they will after the removal.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.contracts import PreparedHook
from hf_slim.core.modules import remove_prepared_hooks_
from hf_slim.pruning.groups import GroupSet, tensor_of
from hf_slim.pruning.removal.cut import Removed, kept_places


class MaskedNorm(PreparedHook):
    """A pair of forward hooks with which a module computes only with the kept indices.

    Args:
        kept: Parameter or buffer name -> (dimension, kept indices).
        is_router: Whether the output of the module is a choice among the groups; otherwise it has the channels.
    """

    def __init__(self, kept: dict[str, tuple[int, Tensor]], is_router: bool):
        self.kept, self.is_router = kept, is_router
        self.places, self.count = next(iter(kept.values()))[1], 0
        self._whole: list[dict[str, Any]] = []

    def before(self, module: nn.Module, given: tuple) -> tuple | None:
        """Replaces the full tensors by narrow ones for this forward pass."""
        whole = {
            name: vars(module)[name]
            for name in ("_parameters", "_buffers", "normalized_shape")
            if name in vars(module)
        }
        self._whole.append(whole)
        self.count = len((whole["_parameters"] | whole["_buffers"])[next(iter(self.kept))])
        narrow = {name: self._narrow(whole[name]) for name in ("_parameters", "_buffers")}
        if "normalized_shape" in whole:
            narrow["normalized_shape"] = (len(self.places),)
        vars(module).update(narrow)
        if self.is_router:
            return None
        return (given[0].index_select(-1, self.places.to(given[0].device)), *given[1:])

    def after(self, module: nn.Module, given: tuple, made: Any) -> Any:
        """Restores the full tensors. Removed channels of the output are zero; choices get their original indices."""
        vars(module).update(self._whole.pop())
        if made is None:  # the forward pass failed
            return None
        if self.is_router:
            return self._renumbered(made)
        wide = made.new_zeros(*made.shape[:-1], self.count)
        return wide.index_copy(-1, self.places.to(made.device), made)

    def _narrow(self, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        chosen = {name: self.kept[name] for name in tensors if name in self.kept}
        return tensors | {
            name: tensors[name].index_select(dim, places.to(tensors[name].device))
            for name, (dim, places) in chosen.items()
        }

    def _renumbered(self, made: tuple) -> tuple:
        if not isinstance(made, tuple) or not any(_is_index(value) for value in made):
            raise ValueError("its router does not return the indices of the chosen experts")
        places = self.places.to(made[0].device)
        logits, *rest = made
        if logits.is_floating_point() and logits.shape[-1] == len(places):
            wide = logits.new_full((*logits.shape[:-1], self.count), torch.finfo(logits.dtype).min)
            logits = wide.index_copy(-1, places, logits)
        return (logits, *(places[value] if _is_index(value) else value for value in rest))


class BypassedLayer(PreparedHook):
    """A forward hook that makes a layer return its input."""

    def __call__(self, module: nn.Module, given: tuple, named: dict[str, Any], made: Any) -> Any:
        """The input of the layer in the form of its output."""
        stream = given[0] if given else named["hidden_states"]
        return stream if isinstance(made, Tensor) else (stream, *made[1:])


def mask_norms_(model: nn.Module, group_sets: Sequence[GroupSet], removed: Removed) -> None:
    """Adds hooks: modules in `masked_norms` get only kept groups; removed layers of `bypassed` return their input."""
    remove_prepared_hooks_(model, (MaskedNorm, BypassedLayer))
    for group_set in group_sets:
        indices = removed.get(group_set.name, [])
        for path in group_set.masked_norms if indices else ():
            module = model.get_submodule(path)
            hook = MaskedNorm(_kept(model, group_set, path, indices), is_router=group_set.kind == "experts")
            module.register_forward_pre_hook(hook.before)
            module.register_forward_hook(hook.after, always_call=True)
        for index in indices if group_set.bypassed else ():
            layer = model.get_submodule(f"{group_set.stack}.{index}")
            layer.register_forward_hook(BypassedLayer(), with_kwargs=True)


def _kept(model: nn.Module, group_set: GroupSet, path: str, indices: list[int]) -> dict[str, tuple[int, Tensor]]:
    return {
        part.tensor.rpartition(".")[2]: (
            part.dim,
            kept_places(tensor_of(model, part.tensor).shape[part.dim], part.places(indices).flatten()),
        )
        for part in group_set.slices
        if part.module == path
    }


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.long
