"""Savings of removal: parameters, multiply-adds or milliseconds, for every number of groups."""

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from hf_slim.core.counting import count_multiply_adds, reads_tokens
from hf_slim.pruning.groups import GroupSet, tensor_of
from hf_slim.pruning.matrices import is_experts
from hf_slim.pruning.structure.example_inputs import example_inputs
from hf_slim.pruning.structure.probe import run_cut, weightless_twin

Losses = dict[int, dict[str, float]]  # dimension of a tensor -> group set name -> cost of one of its groups


@dataclass(frozen=True)
class Savings:
    """Savings of removing groups.

    Attributes:
        first: Group set name -> `(count + 1,)`: saving of removing n groups while everything else is kept.
        priced: The same made concave, for ranking steps: a small saving before a large one does not stop the removal.
        total: Cost of the stacked layers.
        shared: (cost, losses) of tensors that several sets make smaller: together they save less than the sum.
    """

    first: dict[str, Tensor]
    priced: dict[str, Tensor]
    total: float = 0.0
    shared: list[tuple[float, Losses]] = field(default_factory=list)

    def of(self, removed: Mapping[str, Sized]) -> float:
        """The saving of removing the groups `removed`."""
        counts = {name: len(indices) for name, indices in removed.items() if name in self.first}
        saved = sum(float(self.first[name][count]) for name, count in counts.items())
        for cost, losses in self.shared:
            alone = (_saved(cost, losses, {name: count}) for name, count in counts.items())
            saved += _saved(cost, losses, counts) - sum(alone)
        return saved


def number_of_groups(group_sets: Iterable[GroupSet]) -> Savings:
    """Savings in groups: every group saves 1."""
    first = {group_set.name: torch.arange(group_set.count + 1, dtype=torch.float64) for group_set in group_sets}
    return Savings(first, first)


def savings_of(model: nn.Module, group_sets: list[GroupSet], measure: str) -> Savings:
    """Savings in parameters or multiply-adds of the stacked layers; see `counted`."""
    return _savings(model, group_sets, measure, counted(model, measure))


def _savings(model: nn.Module, group_sets: list[GroupSet], measure: str, sizes: dict[str, float]) -> Savings:
    losses: dict[str, Losses] = {}
    for group_set in group_sets:
        for part in () if group_set.is_depth else group_set.slices:
            module = model.get_submodule(part.module)
            is_free = measure == "macs" and part.dim == 0 and is_experts(module)  # experts per token do not change
            if part.tensor in sizes and not is_free:
                by_set = losses.setdefault(part.tensor, {}).setdefault(part.dim, {})
                share = part.width / tensor_of(model, part.tensor).shape[part.dim]
                by_set[group_set.name] = by_set.get(group_set.name, 0) + share * sizes[part.tensor]
    first = {}
    for group_set in group_sets:
        numbers = torch.arange(group_set.count + 1, dtype=torch.float64)
        first[group_set.name] = torch.zeros_like(numbers)
        if group_set.stack:
            whole = sum(size for path, size in sizes.items() if path.startswith(f"{group_set.stack}."))
            first[group_set.name] = numbers * (whole / group_set.count)
        for inner in group_set.parts:
            whole = _savings(model, [inner], measure, sizes).first[inner.name][-1]
            first[group_set.name] += numbers * (whole / group_set.count)
        for path, cut in losses.items():
            first[group_set.name] += _saved(sizes[path], cut, {group_set.name: numbers})
    shared = [(sizes[path], cut) for path, cut in losses.items() if len(set().union(*cut.values())) > 1]
    return Savings(first, first, sum(sizes.values()), shared)


def savings_in_time(timings: dict, group_sets: Iterable[GroupSet]) -> Savings:
    """Savings in milliseconds, from the result of `measure_latency`."""
    first, priced = {}, {}
    counts = {group_set.name: group_set.count for group_set in group_sets}
    for curve in timings["curves"]:
        removed = [curve["kept"][0] - kept for kept in curve["kept"]]
        saved = [max(0.0, curve["ms"][0] - ms) for ms in curve["ms"]]
        rising = torch.tensor(saved, dtype=torch.float64).cummax(0).values.tolist()
        points = list(zip(removed, rising, strict=True))
        for name in (name for name in curve["group_sets"] if name in counts):
            first[name] = _interpolated(points, counts[name])
            priced[name] = _interpolated(_concave(points), counts[name])
    return Savings(first, priced, timings["total_ms"])


def layer_cost(model: nn.Module, measure: str) -> float:
    """Parameters, or multiply-adds, of the stacked layers; embeddings and the output head do not count."""
    return sum(counted(model, measure).values())


def counted(model: nn.Module, measure: str) -> dict[str, float]:
    """Path of every weight that counts -> its parameters, or its multiply-adds.

    These are the weights of the stacked layers; in a model without stacks, of all layers. Multiply-adds are for one
    token if the model reads only text, otherwise for one dummy example; see `core.counting`. They are counted with a
    copy without weights on the CPU, so shapes are enough.

    Args:
        measure: "parameters" or "macs".
    Raises: SlimError: for macs, if no example input for the model can be made.
    """
    sizes = _parameters(model) if measure == "parameters" else _multiply_adds(model)
    has_stacks = any(isinstance(module, nn.ModuleList) and len(module) for module in model.modules())
    return {
        path: float(size)
        for path, size in sizes.items()
        if not has_stacks or any(part.isdigit() for part in path.split("."))
    }


def _parameters(model: nn.Module) -> dict[str, int]:
    layers = [(name, module) for name, module in model.named_modules() if not isinstance(module, nn.Embedding)]
    own = ((name, *found) for name, module in layers for found in module.named_parameters(recurse=False))
    return {f"{name}.{key}": parameter.numel() for name, key, parameter in own}


def _multiply_adds(model: nn.Module) -> dict[str, int]:
    with torch.random.fork_rng(devices=[]):  # counting must not change the random numbers of a run
        inputs, twin = example_inputs(model, tokens=1), weightless_twin(model)
        return count_multiply_adds(twin, lambda: run_cut(twin, inputs), reads_tokens(inputs)).weights


def _saved(cost: float, losses: Losses, counts: Mapping[str, Tensor | int]) -> Tensor | float:
    """The saving in a tensor of this cost when its dimensions become smaller by `counts` groups of each set."""
    lost = [sum(loss * counts.get(name, 0) for name, loss in by_set.items()) for by_set in losses.values()]
    return lost[0] if len(lost) == 1 else cost * (1 - prod(1 - each / cost for each in lost))


def _interpolated(points: list[tuple[int, float]], count: int) -> Tensor:
    """Linear interpolation of `points` at 0, 1, ... count; constant after the last point."""
    positions, values = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    at = torch.arange(count + 1, dtype=torch.float64).clamp(max=positions[-1])
    right = torch.searchsorted(positions, at).clamp(min=1)
    share = (at - positions[right - 1]) / (positions[right] - positions[right - 1])
    return values[right - 1].lerp(values[right], share)


def _concave(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points of the upper convex hull."""
    hull: list[tuple[int, float]] = []
    for position, value in points:
        while len(hull) > 1:
            (left, low), (middle, high) = hull[-2:]
            if (high - low) * (position - left) > (value - low) * (middle - left):
                break
            hull.pop()
        hull.append((position, value))
    return hull
