"""How many groups go, and which: from a config and scores to lists of indices."""

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.schedule import scheduled
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.removal import Removed
from hf_slim.pruning.savings import Savings, number_of_groups, savings_in_time, savings_of

Lane = list[GroupSet]  # sets that lose the same number at the same time
ROUNDING = 1e-9  # relative, of sums of savings


@dataclass(frozen=True)
class Pot:
    """Sets of which the least important groups go, wherever they are, until enough is gone.

    Attributes:
        lanes: They compete with each other.
        amount: How much goes in the end, as the plan's savings count it.
        is_target: Whether at least so much goes, at most a step more; if not, at most so much.
        smallest: What the smallest step saves.
    """

    lanes: list[Lane]
    amount: float
    is_target: bool
    smallest: float

    @property
    def group_sets(self) -> list[GroupSet]:
        return [group_set for lane in self.lanes for group_set in lane]


@dataclass(frozen=True)
class Plan:
    """What is to go in the end.

    Attributes:
        group_sets: Those that may lose groups.
        ends: Group set name -> how many groups are gone after its first step, its second, ...; the rest stays.
        pots: Every set is in one.
        savings: What counts.
        timings: What was measured for that, if anything.
    """

    group_sets: list[GroupSet]
    ends: dict[str, Tensor]
    pots: list[Pot]
    savings: Savings
    timings: dict[str, Any] | None = None

    @property
    def most(self) -> dict[str, range]:
        """Group set name -> as many groups as may go."""
        return {name: range(int(ends[-1]) if len(ends) else 0) for name, ends in self.ends.items()}


def plan_removal(
    model: nn.Module, group_sets: list[GroupSet], config: PruningConfig, timings: dict[str, Any] | None = None
) -> Plan:
    """The plan of a config for a model; shapes are enough.

    Args:
        timings: What `measure_latency` has found, for a target in time.
    Raises: SlimError: if the model has no such structure, an amount removes nothing or more than may go, or `ignore`
        matches nothing.
    """
    chosen = candidates(group_sets, config)
    ends = {group_set.name: step_ends(group_set, config) for group_set in chosen}
    if config.target is None:
        pots = [pot for kind in config.kinds for pot in _quotas(kind, chosen, ends, config)]
        return Plan(chosen, ends, pots, number_of_groups(chosen))
    measure, share = next(iter(config.target.items()))
    savings = savings_in_time(timings, chosen) if timings else savings_of(model, chosen, measure)
    spent_on = [found for found in chosen if found.name in savings.first and savings.first[found.name].any()]
    if not spent_on:
        raise SlimError(
            f"`target` {config.target} was set, but no layer of this model has {' or '.join(config.kinds)} that could "
            "go. `hf-slim inspect` lists what can be pruned; name such kinds in `spend_on`."
        )
    ends = {group_set.name: ends[group_set.name] for group_set in spent_on}
    pot = Pot(_lanes(spent_on, ends, config), (1 - share) * savings.total, True, 0.0)
    plan = Plan(spent_on, ends, [pot], savings, timings)
    most = savings.of(plan.most)
    if pot.amount > most * (1 + ROUNDING):
        raise SlimError(
            f"`target` {config.target} asks for {1 - share:.0%} of the {measure} to go, but at most "
            f"{most / savings.total:.0%} can: the rest lies elsewhere, or is kept by `floor`, `round_to` or `ignore`. "
            f"Use a target of at least {math.ceil(100 * (1 - most / savings.total)) / 100:g}."
        )
    return plan


def expected_losses(plan: Plan) -> dict[str, float]:
    """Group set name -> how many of its groups go; an average over layers where training decides which."""
    losses = {}
    for pot in plan.pots:
        most = {group_set.name: plan.most[group_set.name] for group_set in pot.group_sets}
        share = pot.amount / (plan.savings.of(most) or 1.0)
        losses |= {name: share * len(groups) for name, groups in most.items()}
    return losses


def choose_removed(
    plan: Plan, scores: dict[str, Tensor], removed: Removed, config: PruningConfig, progress: float
) -> Removed:
    """The groups that are to be zero at this progress: those that are already, and the least important others.

    Args:
        scores: Group set name -> `(count,)`, higher is dearer.
        removed: What has gone so far; it comes back only with `regrow`.
        progress: Share of training done, in [0, 1].
    Returns: group set name -> sorted indices; `removed` itself where nothing changes. Ties go to the lower index, so
        that all ranks choose alike.
    """
    fraction = scheduled(config.schedule, progress, config.start, config.stop, config.rounds)
    chosen = gone = {} if config.regrow and progress < 1 else removed
    for pot in plan.pots:
        amount = pot.amount * fraction if pot.is_target else int(pot.amount * fraction)
        names = [group_set.name for group_set in pot.group_sets]
        while True:  # more than once only where groups save less the more of the others are gone
            left = amount - plan.savings.of({name: chosen[name] for name in names if name in chosen})
            if left <= amount * ROUNDING or left < pot.smallest:
                break
            taken = _taken(plan, pot, scores, chosen, left)
            if not taken:
                break
            chosen = chosen | taken
    return removed if chosen is gone is removed or chosen == removed else chosen


def _taken(plan: Plan, pot: Pot, scores: dict[str, Tensor], gone: Removed, left: float) -> Removed:
    """The sets that lose more, with all that they have lost then: next steps worth `left`, the cheapest first."""
    queues = [_Queue.of(plan, lane, scores, gone) for lane in pot.lanes]
    prices = torch.cat([queue.prices for queue in queues])
    order = prices.sort(stable=True).indices if len(queues) > 1 else torch.arange(len(prices))  # one is sorted
    saved = torch.cat([queue.savings for queue in queues])[order].cumsum(0)
    if pot.is_target:
        number = int(torch.searchsorted(saved, left * (1 - ROUNDING))) + 1
    else:
        number = int(torch.searchsorted(saved, left + ROUNDING, right=True))
    lane_of = torch.repeat_interleave(torch.tensor([len(queue.prices) for queue in queues]))
    steps = lane_of[order[:number]].bincount(minlength=len(queues)).tolist()
    taken: Removed = {}
    for queue, lane, count in zip(queues, pot.lanes, steps, strict=True):
        for group_set, groups in zip(lane, queue.orders, strict=True) if count else ():
            is_gone = torch.zeros(group_set.count, dtype=torch.bool)
            is_gone[torch.tensor(gone.get(group_set.name, []), dtype=torch.long)] = True
            is_gone[groups[queue.begin : int(queue.ends[count - 1])]] = True
            taken[group_set.name] = is_gone.nonzero().squeeze(1).tolist()
    return taken


@dataclass(frozen=True)
class _Queue:
    """The steps of one lane that are still to come.

    Attributes:
        orders: For each set its groups, the least important first; those that have gone come before.
        begin: How many groups are gone before the first step.
        ends: How many are gone after each.
        prices: Importance lost for what each step saves; they rise.
        savings: What it saves.
    """

    orders: list[Tensor]
    begin: int
    ends: Tensor
    prices: Tensor
    savings: Tensor

    @classmethod
    def of(cls, plan: Plan, lane: Lane, scores: dict[str, Tensor], gone: Removed) -> "_Queue":
        ends = plan.ends[lane[0].name]
        starts = torch.cat([torch.zeros(1, dtype=torch.long), ends])
        first = int(torch.searchsorted(starts, max(len(gone.get(group_set.name, ())) for group_set in lane)))
        starts, ends = starts[first:], ends[first:]
        if not len(ends):
            return cls([torch.empty(0)] * len(lane), 0, ends, torch.empty(0).double(), torch.empty(0).double())
        begin, last = int(starts[0]), int(ends[-1])
        orders, lost, priced, saved = [], 0, 0, 0
        for group_set in lane:
            score = scores[group_set.name].detach().double().cpu()
            order = least_first(group_set, score, gone.get(group_set.name, []))
            orders.append(order)
            lost += torch.segment_reduce(score[order[begin:last]], "sum", lengths=starts.diff())
            priced += plan.savings.priced[group_set.name][starts].diff()
            saved += plan.savings.first[group_set.name][starts].diff()
        prices = (lost / priced.clamp(min=torch.finfo(torch.float64).tiny)).cummax(0).values  # but for rounding
        return cls(orders, begin, ends, prices, saved)


def least_first(group_set: GroupSet, score: Tensor, gone: list[int]) -> Tensor:
    """All groups in the order in which they may go: those that have gone, then by score, as `balance` demands."""
    score = score.clone()
    score[torch.tensor(group_set.pinned, dtype=torch.long)] = torch.inf
    score[torch.tensor(gone, dtype=torch.long)] = -torch.inf
    if not group_set.balance:
        return score.sort(stable=True).indices
    order = score.view(-1, group_set.balance).sort(dim=1, stable=True).indices
    return (order + torch.arange(0, group_set.count, group_set.balance).unsqueeze(1)).t().flatten()


def candidates(group_sets: list[GroupSet], config: PruningConfig) -> list[GroupSet]:
    """The sets that a config names and does not ignore.

    Raises: SlimError: if `ignore` matches nothing.
    """
    group_sets = [group_set for group_set in group_sets if group_set.kind in config.kinds]
    for pattern in config.ignore:
        if not any(fnmatch.fnmatch(group_set.name, pattern) for group_set in group_sets):
            names = ", ".join(group_set.name for group_set in group_sets[:3])
            raise SlimError(f"`ignore` '{pattern}' matches none of the prunable layers, which are: {names}, ...")
    return [
        group_set
        for group_set in group_sets
        if not any(fnmatch.fnmatch(group_set.name, pattern) for pattern in config.ignore)
    ]


def step_ends(group_set: GroupSet, config: PruningConfig) -> Tensor:
    """How many groups are gone after one step, two, ...: what is left is legal after each, and never too little."""
    count, size = group_set.count, math.lcm(config.round_to.get(group_set.kind, 1), group_set.multiple)
    if group_set.balance:
        size = count // group_set.balance  # one head from every key-value head
    keep = max(size if size <= count else 1, round(config.floor * count), len(group_set.pinned))
    ends = torch.arange(count % size or size, count + 1, size)
    return ends[count - ends >= keep]


def _lanes(group_sets: list[GroupSet], ends: dict[str, Tensor], config: PruningConfig) -> list[Lane]:
    lanes: dict[Any, Lane] = {}
    for group_set in group_sets:
        alike = (group_set.kind, group_set.count, len(ends[group_set.name]))
        lanes.setdefault(alike if config.uniform[group_set.kind] else group_set.name, []).append(group_set)
    return list(lanes.values())


def _quotas(kind: str, group_sets: list[GroupSet], ends: dict[str, Tensor], config: PruningConfig) -> list[Pot]:
    share = config.sparsity[kind]
    sets = [group_set for group_set in group_sets if group_set.kind == kind]
    if not sets:
        raise SlimError(
            f"`sparsity.{kind}` is {share}, but no layer of this model was recognised as {kind}. Set it to 0; "
            "`hf-slim inspect` lists what can be pruned, and why other layers cannot."
        )
    if config.uniform[kind]:
        pots = [_quota([found], _nearest(ends[found.name], share * found.count), ends) for found in sets]
    else:
        most = sum(int(ends[found.name][-1]) for found in sets if len(ends[found.name]))
        pots = [_quota(sets, min(round(share * sum(found.count for found in sets)), most), ends)]
    if not any(pot.amount for pot in pots):
        smallest = min(sets, key=lambda found: found.count)
        legal = (smallest.count - ends[smallest.name]).tolist()[:4]
        raise SlimError(
            f"`sparsity.{kind}` {share} removes nothing: a layer has {smallest.count} groups, of which "
            f"{', '.join(map(str, sorted(legal))) or 'none but all'} may stay. Use at least "
            f"{1 / smallest.count:.2g}, or `uniform: {{{kind}: false}}` to choose across all layers."
        )
    return pots


def _quota(sets: Iterable[GroupSet], amount: int, ends: dict[str, Tensor]) -> Pot:
    lanes = [[group_set] for group_set in sets]
    steps = [torch.cat([ends[found.name][:1], ends[found.name].diff()]) for (found,) in lanes]
    return Pot(lanes, amount, False, float(torch.cat(steps).min()) if any(map(len, steps)) else math.inf)


def _nearest(ends: Tensor, wanted: float) -> int:
    """The number of groups that can go and comes nearest to `wanted`; the lower of two."""
    return min([0, *ends.tolist()], key=lambda total: (abs(total - wanted), total))
