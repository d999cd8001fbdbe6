"""Groups: slices of several tensors that must be removed together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError


class Refusal(NamedTuple):
    """The reason why a part of a model cannot be pruned."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Slice:
    """The indices of one dimension of one tensor that belong to the groups of a set.

    Attributes:
        tensor: Path of a parameter or buffer: "model.layers.0.mlp.up_proj.weight".
        dim: Dimension along which the groups are arranged.
        width: Number of consecutive indices of one group.
        offset: Index at which the first group starts.
        reads: Whether these are columns that read the group; otherwise they are rows that write it.
        period: Number of adjacent groups before a gap; None: all groups are adjacent.
        stride: Distance from the start of one such run of groups to the next.
        only: The group that all these indices belong to, if every group has separate tensors.
        only_zeroed: Whether the indices are zeroed but not removed; they are removed with the module around them.
    """

    tensor: str
    dim: int
    width: int
    offset: int = 0
    reads: bool = False
    period: int | None = None
    stride: int = 0
    only: int | None = None
    only_zeroed: bool = False

    @property
    def module(self) -> str:
        """Path of the layer that holds the tensor."""
        return self.tensor.rpartition(".")[0]

    def places(self, groups: list[int] | range | Tensor) -> Tensor:
        """Indices along `dim` that belong to `groups`: `(len(groups), width)`."""
        groups = torch.as_tensor(groups, dtype=torch.long)
        if self.only is not None:
            groups = groups[groups == self.only] * 0
        starts = groups * self.width
        if self.period:
            starts = groups // self.period * self.stride + groups % self.period * self.width
        return (starts + self.offset).unsqueeze(1) + torch.arange(self.width)


@dataclass(frozen=True)
class GroupSet:
    """All groups of one kind that layers with a common structure share.

    Attributes:
        name: Path of the part of the model and the kind, unique in the model: "model.layers.0.mlp/ffn".
        kind: One of `KINDS` in `pruning/config.py`.
        count: Number of groups.
        slices: All tensors with weights of the groups; slices that read the groups are last.
        attributes: (module path, attribute) of sizes that modules store; they become smaller in proportion. An
            attribute "config.x" is the field x of a config, which the module gets as a separate copy.
        config_fields: Fields of the model's config that become smaller by the same share, if all layers do.
        balance: Length of runs of groups from which the same number must be removed; None: any group may be removed.
        multiple: The number of kept groups must be a multiple of this.
        keep: Smallest number of groups that must be kept.
        pinned: Groups that must be kept: T5's first layer computes the position bias of all others.
        masked_norms: Paths of modules that mix all groups, such as norms over the hidden width and routers over
            experts. While groups are masked, they get only the kept ones.
        stack: For whole layers: path of their list.
        bypassed: Whether a masked layer is bypassed, because it still has an effect when its output weights are zero.
        parts: For blocks (the attention or feed-forward part of every layer): the group set within each block.
    """

    name: str
    kind: str
    count: int
    slices: tuple[Slice, ...]
    attributes: tuple[tuple[str, str], ...] = ()
    config_fields: tuple[str, ...] = ()
    balance: int | None = None
    multiple: int = 1
    keep: int = 1
    pinned: tuple[int, ...] = ()
    masked_norms: tuple[str, ...] = ()
    stack: str | None = None
    bypassed: bool = False
    parts: tuple["GroupSet", ...] = ()

    @property
    def is_depth(self) -> bool:
        """Whether every group has separate tensors: whole layers, or their attention or feed-forward parts."""
        return bool(self.stack or self.parts)

    def parameters_per_group(self, model: nn.Module) -> int:
        """Number of weights and biases of one group, on average."""
        if self.stack:
            return sum(parameter.numel() for parameter in model.get_submodule(self.stack).parameters()) // self.count
        if self.parts:
            return sum(part.parameters_per_group(model) * part.count for part in self.parts) // self.count
        found = own_parameters(model, self)
        return sum(part.width * tensor.numel() // tensor.shape[part.dim] for part, tensor in found)


def one_by_one(group_set: GroupSet) -> list[GroupSet]:
    """One set per group if the groups have separate tensors; otherwise the set itself."""
    if not group_set.is_depth:
        return [group_set]
    own = [
        tuple(replace(part, only=None) for part in group_set.slices if part.only == index)
        for index in range(group_set.count)
    ]
    return [replace(group_set, name=f"{group_set.name}/{i}", count=1, slices=parts) for i, parts in enumerate(own)]


def without_blocks(
    group_sets: Sequence[GroupSet], removed: dict[str, list[int]]
) -> tuple[list[GroupSet], dict[str, list[int]]]:
    """The same removal without blocks: a removed block is replaced by all groups within it."""
    expanded = {name: set(indices) for name, indices in removed.items()}
    if len({group_set.name for group_set in group_sets}) < len(group_sets):
        raise ValueError(f"group sets of one name: {[group_set.name for group_set in group_sets]}")
    plain = {group_set.name: group_set for group_set in group_sets if not group_set.parts}
    for group_set in group_sets:
        for index in removed.get(group_set.name, ()) if group_set.parts else ():
            part = group_set.parts[index]
            plain.setdefault(part.name, part)
            expanded[part.name] = set(range(part.count))
    return list(plain.values()), {name: sorted(expanded[name]) for name in plain if expanded.get(name)}


def tensor_of(model: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(model.get_submodule(module), name)


def common_ancestor(paths: list[str]) -> str:
    """The path of the module that contains all modules or tensors at `paths`."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def own_parameters(model: nn.Module, group_set: GroupSet) -> list[tuple[Slice, nn.Parameter]]:
    """The slices of parameters with their tensors; tied parameters are listed once."""
    found = {}
    for part in group_set.slices:
        tensor = tensor_of(model, part.tensor)
        if isinstance(tensor, nn.Parameter):
            found.setdefault((id(tensor), part.dim, part.offset), (part, tensor))
    return list(found.values())


def weight_blocks(model: nn.Module, group_set: GroupSet) -> list[Tensor]:
    """The weights and biases of a group set, each as `(count, width, ...)`."""
    return [_blocks(tensor.detach(), part, group_set.count) for part, tensor in own_parameters(model, group_set)]


def gradient_blocks(model: nn.Module, group_set: GroupSet) -> list[Tensor]:
    """The gradients of a group set, each as `(count, width, ...)`.

    Raises: SlimError: if a weight has no gradient.
    """
    blocks = []
    for part, tensor in own_parameters(model, group_set):
        if tensor.grad is None:
            raise SlimError(
                f"No gradient reached '{part.tensor}', so the importance of its groups is unknown. Unfreeze the "
                "layer, set the sparsity of its kind to 0, or choose a criterion without gradient: l1_tail, wanda."
            )
        blocks.append(_blocks(tensor.grad, part, group_set.count))
    return blocks


def _blocks(tensor: Tensor, part: Slice, count: int) -> Tensor:
    rows = tensor.movedim(part.dim, 0)
    if part.period:
        rows = rows.index_select(0, part.places(range(count)).flatten().to(tensor.device))
    else:
        rows = rows.narrow(0, part.offset, count * part.width)
    return rows.unflatten(0, (count, part.width)) if rows.dim() > 1 else rows.view(count, part.width, 1)
