"""Plans the removal for a config and a model: amounts, lockstep sets and legal numbers of groups."""

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimConfigError
from hf_slim.pruning.budget.legal_sizes import legal_ends
from hf_slim.pruning.budget.savings import Savings, number_of_groups, savings_in_time, savings_of
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet

LockstepSets = list[GroupSet]  # sets that lose the same number at the same time
LENIENCE = 0.05  # share of the groups of a layer by which a legal number may differ from the wanted one
SUM_TOLERANCE = 1e-9  # relative difference between sums of the same savings in another order


@dataclass(frozen=True)
class Budget:
    """Group sets that share an amount: the least important groups of all of them are removed until it is reached.

    Attributes:
        lockstep_sets: The sets that share the amount.
        amount: The amount that is removed at the end, in units of the plan's savings.
        is_target: Whether `amount` is a minimum, exceeded by at most one step; otherwise it is a maximum.
        smallest: The saving of the smallest step.
    """

    lockstep_sets: list[LockstepSets]
    amount: float
    is_target: bool
    smallest: float

    @property
    def group_sets(self) -> list[GroupSet]:
        """Every group set of this budget."""
        return [group_set for sets in self.lockstep_sets for group_set in sets]


@dataclass(frozen=True)
class Plan:
    """The removal that is planned for the end of training.

    Attributes:
        group_sets: Sets of which groups may be removed.
        ends: Group set name -> number of removed groups after its first step, its second step, and so on.
        budgets: The budgets; every set is in one of them.
        savings: The savings that amounts are measured in.
        timings: The measured times, for a latency target.
    """

    group_sets: list[GroupSet]
    ends: dict[str, Tensor]
    budgets: list[Budget]
    savings: Savings
    timings: dict[str, Any] | None = None

    @property
    def most(self) -> dict[str, range]:
        """Group set name -> range of the largest number of groups that may be removed."""
        return {name: range(int(ends[-1]) if len(ends) else 0) for name, ends in self.ends.items()}


def plan_removal(
    model: nn.Module, group_sets: list[GroupSet], config: PruningConfig, timings: dict[str, Any] | None = None
) -> Plan:
    """The plan of a config for a model; shapes are enough.

    Args:
        timings: The result of `measure_latency`, for a latency target.
    Raises: SlimConfigError: if the model has no such structure, an amount removes nothing or too much, or `ignore`
        matches nothing.
    """
    chosen = candidates(group_sets, config)
    ends = {group_set.name: step_ends(group_set, config) for group_set in chosen}
    if config.target is None:
        final = _in_the_end(model, chosen, ends, config)
        budgets = [budget for kind in config.kinds for budget in _quotas(kind, chosen, ends, final, config)]
        return Plan(chosen, ends, budgets, number_of_groups(chosen))
    measure, share = next(iter(config.target.items()))
    savings = savings_in_time(timings, chosen) if timings else savings_of(model, chosen, measure)
    spent_on = [found for found in chosen if found.name in savings.first and savings.first[found.name].any()]
    if not spent_on:
        raise SlimConfigError(
            f"`target` {config.target} was set, but no layer of this model has {' or '.join(config.kinds)} that can "
            "be removed. `hf-slim inspect` lists what can be pruned; name such kinds in `spend_on`."
        )
    ends = _in_the_end(model, spent_on, ends, config)
    budget = Budget(_lockstep_sets(spent_on, ends, config), (1 - share) * savings.total, True, 0.0)
    plan = Plan(spent_on, ends, [budget], savings, timings)
    most = savings.of(plan.most)
    if budget.amount > most * (1 + SUM_TOLERANCE):
        raise SlimConfigError(
            f"`target` {config.target} asks to remove {1 - share:.0%} of the {measure}, but at most "
            f"{most / savings.total:.0%} can be removed: the rest is in other parts, or kept by `floor`, "
            "`round_to` or `ignore`. "
            f"Set a target of at least {math.ceil(100 * (1 - most / savings.total)) / 100:g}."
        )
    return plan


def expected_losses(plan: Plan) -> dict[str, float]:
    """Group set name -> number of groups removed; a mean over layers if training decides in which they are removed."""
    losses = {}
    for budget in plan.budgets:
        most = {group_set.name: plan.most[group_set.name] for group_set in budget.group_sets}
        share = budget.amount / (plan.savings.of(most) or 1.0)
        losses |= {name: share * len(groups) for name, groups in most.items()}
    return losses


def candidates(group_sets: list[GroupSet], config: PruningConfig) -> list[GroupSet]:
    """The sets of the kinds that a config prunes, without ignored ones.

    Raises: SlimConfigError: if `ignore` matches nothing.
    """
    group_sets = [group_set for group_set in group_sets if group_set.kind in config.kinds]
    for pattern in config.ignore:
        if not any(fnmatch.fnmatch(group_set.name, pattern) for group_set in group_sets):
            names = ", ".join(group_set.name for group_set in group_sets[:3])
            raise SlimConfigError(f"`ignore` '{pattern}' matches none of the prunable layers, which are: {names}, ...")
    return [
        group_set
        for group_set in group_sets
        if not any(fnmatch.fnmatch(group_set.name, pattern) for pattern in config.ignore)
    ]


def step_ends(group_set: GroupSet, config: PruningConfig) -> Tensor:
    """Numbers of removed groups after one step, two steps, ...; the kept number is always legal and large enough."""
    count, size = group_set.count, math.lcm(config.round_to.get(group_set.kind, 1), group_set.multiple)
    if group_set.balance:
        size = count // group_set.balance  # one head from every key-value head
    keep = max(size if size <= count else 1, round(config.floor * count), group_set.keep, len(group_set.pinned))
    ends = torch.arange(count % size or size, count + 1, size)
    return ends[count - ends >= keep]


def _lockstep_sets(group_sets: list[GroupSet], ends: dict[str, Tensor], config: PruningConfig) -> list[LockstepSets]:
    lockstep_sets: dict[Any, LockstepSets] = {}
    for group_set in group_sets:
        alike = (group_set.kind, group_set.count, len(ends[group_set.name]))
        lockstep_sets.setdefault(alike if config.uniform_by_kind[group_set.kind] else group_set.name, []).append(
            group_set
        )
    return list(lockstep_sets.values())


def _in_the_end(
    model: nn.Module, group_sets: list[GroupSet], ends: dict[str, Tensor], config: PruningConfig
) -> dict[str, Tensor]:
    """The numbers of groups that may be removed at the end: in uniform layers, those that the config accepts."""
    legal: dict[Any, Tensor] = {}
    for group_set in group_sets:
        key = (group_set.kind, group_set.count, group_set.config_fields)
        if key not in legal:
            of_this = ends[group_set.name]
            legal[key] = legal_ends(model, group_set, of_this) if config.uniform_by_kind[group_set.kind] else of_this
    return {found.name: legal[found.kind, found.count, found.config_fields] for found in group_sets}


def _quotas(
    kind: str, group_sets: list[GroupSet], ends: dict[str, Tensor], final: dict[str, Tensor], config: PruningConfig
) -> list[Budget]:
    share = config.sparsity_by_kind[kind]
    sets = [group_set for group_set in group_sets if group_set.kind == kind]
    if not sets:
        raise SlimConfigError(
            f"`sparsity.{kind}` is {share}, but no layer of this model was recognised as {kind}. Set it to 0; "
            "`hf-slim inspect` lists what can be pruned, and why other layers cannot."
        )
    if config.uniform_by_kind[kind]:
        budgets = [_quota([found], _nearest_legal(found, ends, final, config), ends) for found in sets]
    else:
        most = sum(int(ends[found.name][-1]) for found in sets if len(ends[found.name]))
        budgets = [_quota(sets, min(round(share * sum(found.count for found in sets)), most), ends)]
    if not any(budget.amount for budget in budgets):
        smallest = min(sets, key=lambda found: found.count)
        legal = (smallest.count - final[smallest.name]).tolist()[:4]
        raise SlimConfigError(
            f"`sparsity.{kind}` {share} removes nothing: a layer has {smallest.count} groups, of which "
            f"{', '.join(map(str, sorted(legal))) or 'none but all'} may be kept. Use at least "
            f"{1 / smallest.count:.2g}, or `uniform: {{{kind}: false}}` to choose across all layers."
        )
    return budgets


def _quota(sets: Iterable[GroupSet], amount: int, ends: dict[str, Tensor]) -> Budget:
    lockstep_sets = [[group_set] for group_set in sets]
    steps = [torch.cat([ends[found.name][:1], ends[found.name].diff()]) for (found,) in lockstep_sets]
    return Budget(lockstep_sets, amount, False, float(torch.cat(steps).min()) if any(map(len, steps)) else math.inf)


def _nearest_legal(
    group_set: GroupSet, ends: dict[str, Tensor], final: dict[str, Tensor], config: PruningConfig
) -> int:
    """The number of groups of a uniform set that are removed.

    Raises: SlimConfigError: if the model's config accepts neither that number nor one near it.
    """
    share, count = config.sparsity_by_kind[group_set.kind], group_set.count
    wanted, legal = _nearest(ends[group_set.name], share * count), _nearest(final[group_set.name], share * count)
    if abs(wanted - legal) > LENIENCE * count:
        numbers = (count - final[group_set.name]).tolist()
        shares = ", ".join(f"{number} (sparsity {1 - number / count:.3g})" for number in numbers[:8])
        raise SlimConfigError(
            f"`sparsity.{group_set.kind}` {share} leaves {count - wanted} of {count} in every layer, which the "
            f"model's config refuses. It accepts {shares}. Choose one of these, or `uniform: "
            f"{{{group_set.kind}: false}}` for a result that hf_slim loads."
        )
    return legal


def _nearest(ends: Tensor, wanted: float) -> int:
    """The number of groups in `ends`, or 0, that is nearest to `wanted`; the lower one of two."""
    return min([0, *ends.tolist()], key=lambda total: (abs(total - wanted), total))
