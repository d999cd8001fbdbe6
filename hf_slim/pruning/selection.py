"""How many groups go, and which: from a config and scores to lists of indices."""

import fnmatch
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.schedule import scheduled
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet, tensor_of
from hf_slim.pruning.layers import is_experts, matrix_of
from hf_slim.pruning.removal import Removed


@dataclass(frozen=True)
class Plan:
    """What is to go in the end.

    Attributes:
        group_sets: Those that may lose groups.
        steps: Group set name -> how many groups go at a time, first to last; the rest stays whatever happens.
        quotas: Lists of sets with the number of groups that they lose together; empty with a budget.
        costs: Group set name -> what one group takes, in units of the budget.
        budget: How much goes, all sets together; None: the quotas say it.
        uniform: Kinds of which every layer loses the same number.
    """

    group_sets: list[GroupSet]
    steps: dict[str, list[int]]
    quotas: list[tuple[list[GroupSet], int]]
    costs: dict[str, float]
    budget: float | None
    uniform: frozenset[str]


def plan_removal(model: nn.Module, group_sets: list[GroupSet], config: PruningConfig) -> Plan:
    """The plan of a config for a model; nothing is measured, and shapes are enough.

    Raises: SlimError: if the model has no such structure, an amount removes nothing or more than may go, or `ignore`
        matches nothing.
    """
    chosen = _not_ignored([group_set for group_set in group_sets if group_set.kind in config.kinds], config)
    steps = {group_set.name: _step_sizes(group_set, config) for group_set in chosen}
    uniform = frozenset(kind for kind, value in config.uniform.items() if value)
    if config.target is None:
        quotas = [quota for kind in config.kinds for quota in _quotas(kind, chosen, steps, config)]
        return Plan(chosen, steps, quotas, {}, None, uniform)
    if not chosen:
        raise SlimError(f"`target` {config.target} was set, but no layer of this model has groups that could go.")
    measure, share = next(iter(config.target.items()))
    costs = {group_set.name: float(group_cost(model, group_set, measure)) for group_set in chosen}
    total = layer_cost(model, measure)
    most = sum(sum(steps[group_set.name]) * costs[group_set.name] for group_set in chosen)
    if (1 - share) * total > most:
        raise SlimError(
            f"`target` {config.target} asks for {1 - share:.0%} of the {measure} to go, but at most "
            f"{most / total:.0%} can: the rest lies elsewhere, or is kept by `floor`, `round_to` or `ignore`. "
            "Use a larger target."
        )
    return Plan(chosen, steps, [], costs, (1 - share) * total, uniform)


def expected_losses(plan: Plan) -> dict[str, float]:
    """Group set name -> how many of its groups go; an average over layers where training decides which."""
    if plan.budget is not None:
        most = sum(sum(plan.steps[group_set.name]) * plan.costs[group_set.name] for group_set in plan.group_sets)
        return {name: sum(steps) * plan.budget / most for name, steps in plan.steps.items()}
    return {group_set.name: quota / len(sets) for sets, quota in plan.quotas for group_set in sets}


def choose_removed(
    plan: Plan, scores: dict[str, Tensor], removed: Removed, config: PruningConfig, progress: float
) -> Removed:
    """The groups that are to be zero at this progress: those that are already, and the least important others.

    Args:
        scores: Group set name -> `(count,)`, higher is dearer.
        removed: What has gone so far; it comes back only with `regrow`.
        progress: Share of training done, in [0, 1].
    Returns: group set name -> sorted indices. Ties go to the lower index, so that all ranks choose alike.
    """
    fraction = scheduled(config.schedule, progress, config.start, config.stop)
    gone = {} if config.regrow and progress < 1 else removed
    chosen = {name: list(indices) for name, indices in gone.items()}
    for sets, quota in plan.quotas:
        _take(plan, sets, scores, chosen, int(quota * fraction), {group_set.name: 1.0 for group_set in sets})
    if plan.budget is not None:
        _take(plan, plan.group_sets, scores, chosen, plan.budget * fraction, plan.costs)
    return {name: sorted(indices) for name, indices in chosen.items() if indices}


def group_cost(model: nn.Module, group_set: GroupSet, measure: str) -> float:
    """Parameters, or multiply-adds per token, that one group takes with it."""
    if measure == "parameters":
        return group_set.parameters_per_group(model)
    total = 0.0
    for part in group_set.slices:
        tensor = tensor_of(model, part.tensor)
        if tensor.dim() > 1:
            total += (
                part.width * tensor.numel() / tensor.shape[part.dim] * _share_used(model.get_submodule(part.module))
            )
    return total


def layer_cost(model: nn.Module, measure: str) -> float:
    """Parameters, or multiply-adds per token, of the stacked layers; embeddings and the output head do not count."""
    has_stacks = any(isinstance(module, nn.ModuleList) and len(module) for module in model.modules())
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or (has_stacks and not any(part.isdigit() for part in name.split("."))):
            continue
        for parameter in module.parameters(recurse=False):
            if measure == "parameters":
                total += parameter.numel()
            elif parameter.dim() > 1 and (matrix_of(module) or is_experts(module)):
                total += parameter.numel() * _share_used(module)
    return total


def _share_used(module: nn.Module) -> float:
    """Share of a layer's weights that one token meets: a few of many experts."""
    if not is_experts(module):
        return 1.0
    config = getattr(module, "config", None)
    return getattr(config, "num_experts_per_tok", 0) / len(module.down_proj) or 1.0


def _not_ignored(group_sets: list[GroupSet], config: PruningConfig) -> list[GroupSet]:
    for pattern in config.ignore:
        if not any(fnmatch.fnmatch(group_set.name, pattern) for group_set in group_sets):
            names = ", ".join(group_set.name for group_set in group_sets[:3])
            raise SlimError(f"`ignore` '{pattern}' matches none of the prunable layers, which are: {names}, ...")
    return [
        group_set
        for group_set in group_sets
        if not any(fnmatch.fnmatch(group_set.name, pattern) for pattern in config.ignore)
    ]


def _step_sizes(group_set: GroupSet, config: PruningConfig) -> list[int]:
    """How many groups may go at a time, so that what is left is legal after every step."""
    size = math.lcm(config.round_to.get(group_set.kind, 1), group_set.multiple)
    if group_set.balance:
        size = group_set.count // group_set.balance  # one head from every key-value head
    keep = max(size if size <= group_set.count else 1, round(config.floor * group_set.count))
    first = group_set.count % size
    sizes = [first] * bool(first) + [size] * (group_set.count // size)
    gone = list(itertools.accumulate(sizes))
    return [step for step, total in zip(sizes, gone, strict=True) if group_set.count - total >= keep]


def _quotas(
    kind: str, group_sets: list[GroupSet], steps: dict[str, list[int]], config: PruningConfig
) -> list[tuple[list[GroupSet], int]]:
    share = config.sparsity[kind]
    sets = [group_set for group_set in group_sets if group_set.kind == kind]
    if not sets:
        raise SlimError(
            f"`sparsity.{kind}` is {share}, but no layer of this model was recognised as {kind}. Set it to 0; "
            "`hf-slim inspect` lists what can be pruned, and why other layers cannot."
        )
    if config.uniform[kind]:
        quotas = [([group_set], _nearest_sum(steps[group_set.name], share * group_set.count)) for group_set in sets]
    else:
        most = sum(sum(steps[group_set.name]) for group_set in sets)
        quotas = [(sets, min(round(share * sum(group_set.count for group_set in sets)), most))]
    if not any(quota for _, quota in quotas):
        smallest = min(group_set.count for group_set in sets)
        legal = sorted({smallest - total for total in itertools.accumulate(steps[sets[0].name])})
        raise SlimError(
            f"`sparsity.{kind}` {share} removes nothing: a layer has {smallest} groups, of which "
            f"{', '.join(map(str, legal[-4:])) or 'none but all'} may stay. Use at least {1 / smallest:.2g}, or "
            f"`uniform: {{{kind}: false}}` to choose across all layers."
        )
    return quotas


def _nearest_sum(sizes: list[int], wanted: float) -> int:
    """The sum of the first sizes that comes nearest to `wanted`."""
    sums = [0, *itertools.accumulate(sizes)]
    return min(sums, key=lambda total: (abs(total - wanted), total))


def _take(
    plan: Plan,
    sets: list[GroupSet],
    scores: dict[str, Tensor],
    chosen: Removed,
    amount: float,
    costs: dict[str, float],
) -> None:
    """Adds the next steps, cheapest first, until groups worth `amount` are gone."""
    spent = sum(len(chosen.get(group_set.name, ())) * costs[group_set.name] for group_set in sets)
    if spent >= amount:
        return
    lanes = _lanes(plan, sets, scores, chosen, costs)
    prices = torch.cat([price for price, _ in lanes])
    lane_of = [lane for lane, (price, _) in enumerate(lanes) for _ in range(len(price))]
    position = [0] * len(lanes)
    for index in prices.sort(stable=True).indices.tolist():
        lane = lane_of[index]
        step = lanes[lane][1][position[lane]]  # prices of a lane rise, so its steps come up in order
        cost = sum(len(groups) * costs[name] for name, groups in step)
        if spent + cost > amount + 1e-6 and plan.budget is None:
            break
        if spent >= amount:
            break
        position[lane] += 1
        spent += cost
        for name, groups in step:
            chosen.setdefault(name, []).extend(groups)


Step = list[tuple[str, list[int]]]  # groups that go together


def _lanes(
    plan: Plan, sets: list[GroupSet], scores: dict[str, Tensor], chosen: Removed, costs: dict[str, float]
) -> list[tuple[Tensor, list[Step]]]:
    """Sequences of steps with rising prices per unit of cost: one per layer, or one per kind where layers go alike."""
    alone = {group_set.name: _steps(plan, group_set, scores, chosen) for group_set in sets}
    lanes = []
    together: dict[tuple[str, int], list[GroupSet]] = {}
    for group_set in sets:
        if plan.budget is not None and group_set.kind in plan.uniform:
            together.setdefault((group_set.kind, group_set.count), []).append(group_set)
        else:
            together[group_set.name, 0] = [group_set]
    for members in together.values():
        steps, prices = [], []
        for parts in zip(*(alone[group_set.name] for group_set in members), strict=True):
            step = [(group_set.name, groups) for group_set, (_, groups) in zip(members, parts, strict=True)]
            steps.append(step)
            cost = sum(len(groups) * costs[name] for name, groups in step)
            prices.append(sum(price for price, _ in parts) / cost)
        lanes.append((torch.tensor(prices, dtype=torch.float64).cummax(0).values if prices else torch.empty(0), steps))
    return lanes


def _steps(
    plan: Plan, group_set: GroupSet, scores: dict[str, Tensor], chosen: Removed
) -> list[tuple[float, list[int]]]:
    """The steps of one layer that are still to come: (summed score, groups)."""
    gone = chosen.get(group_set.name, [])
    score = scores[group_set.name].detach().double().cpu().clone()
    score[gone] = -torch.inf
    if group_set.balance:
        order = score.view(-1, group_set.balance).sort(dim=1, stable=True).indices
        order = (order + torch.arange(0, group_set.count, group_set.balance).unsqueeze(1)).t().flatten()
    else:
        order = score.sort(stable=True).indices
    sizes, values, groups = plan.steps[group_set.name], score[order].tolist(), order.tolist()
    found, start = [], 0
    for size in sizes:
        if start >= len(gone):
            found.append((sum(values[start : start + size]), groups[start : start + size]))
        start += size
    return found
