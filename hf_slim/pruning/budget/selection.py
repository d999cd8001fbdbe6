"""Chooses the groups to remove, from a plan and scores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_slim.core.schedule import scheduled
from hf_slim.pruning.budget.plan import SUM_TOLERANCE, Budget, LockstepSets, Plan
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.removal.cut import Removed


def choose_removed(
    plan: Plan, scores: dict[str, Tensor], removed: Removed, config: PruningConfig, progress: float
) -> Removed:
    """The groups to mask at this progress: the masked ones, and the least important of the others.

    Args:
        scores: Group set name -> `(count,)`, higher is more important.
        removed: The groups that are masked so far; only `regrow` may unmask them.
        progress: Share of training done, in [0, 1].
    Returns: group set name -> sorted indices; `removed` itself if nothing changes. Of equal scores, the lower index is
        removed first, so that all ranks make the same choice.
    """
    fraction = scheduled(config.schedule, progress, config.start, config.stop, config.rounds)
    chosen = start = {} if config.regrow and progress < 1 else removed
    for budget in plan.budgets:
        amount = budget.amount * fraction if budget.is_target else int(budget.amount * fraction)
        names = [group_set.name for group_set in budget.group_sets]
        while True:  # repeats only if groups save less after other groups are removed
            left = amount - plan.savings.of({name: chosen[name] for name in names if name in chosen})
            if left <= amount * SUM_TOLERANCE or left < budget.smallest:
                break
            taken = _taken(plan, budget, scores, chosen, left)
            if not taken:
                break
            chosen = chosen | taken
    return removed if chosen is start is removed or chosen == removed else chosen


def _taken(plan: Plan, budget: Budget, scores: dict[str, Tensor], removed: Removed, left: float) -> Removed:
    """All removed groups of the sets that change, after further steps that save `left`, least important first."""
    queues = [_Queue.of(plan, sets, scores, removed) for sets in budget.lockstep_sets]
    prices = torch.cat([queue.prices for queue in queues])
    order = prices.sort(stable=True).indices if len(queues) > 1 else torch.arange(len(prices))  # one is sorted
    saved = torch.cat([queue.savings for queue in queues])[order].cumsum(0)
    if budget.is_target:
        number = int(torch.searchsorted(saved, left * (1 - SUM_TOLERANCE))) + 1
    else:
        number = int(torch.searchsorted(saved, left + SUM_TOLERANCE, right=True))
    queue_of = torch.repeat_interleave(torch.tensor([len(queue.prices) for queue in queues]))
    steps = queue_of[order[:number]].bincount(minlength=len(queues)).tolist()
    taken: Removed = {}
    for queue, sets, count in zip(queues, budget.lockstep_sets, steps, strict=True):
        for group_set, groups in zip(sets, queue.orders, strict=True) if count else ():
            is_removed = torch.zeros(group_set.count, dtype=torch.bool)
            is_removed[torch.tensor(removed.get(group_set.name, []), dtype=torch.long)] = True
            is_removed[groups[queue.begin : int(queue.ends[count - 1])]] = True
            taken[group_set.name] = is_removed.nonzero().squeeze(1).tolist()
    return taken


@dataclass(frozen=True)
class _Queue:
    """The next steps of sets from which groups are removed in lockstep.

    Attributes:
        orders: For each set its groups: those already removed, then the others by importance, the least first.
        begin: Number of removed groups before the first step.
        ends: Number of removed groups after each step.
        prices: Lost importance per saving of each step, in ascending order up to rounding, which `cummax` removes.
        savings: Saving of each step.
    """

    orders: list[Tensor]
    begin: int
    ends: Tensor
    prices: Tensor
    savings: Tensor

    @classmethod
    def of(cls, plan: Plan, sets: LockstepSets, scores: dict[str, Tensor], removed: Removed) -> "_Queue":
        ends = plan.ends[sets[0].name]
        starts = torch.cat([torch.zeros(1, dtype=torch.long), ends])
        first = int(torch.searchsorted(starts, max(len(removed.get(group_set.name, ())) for group_set in sets)))
        starts, ends = starts[first:], ends[first:]
        if not len(ends):
            return cls([torch.empty(0)] * len(sets), 0, ends, torch.empty(0).double(), torch.empty(0).double())
        begin, last = int(starts[0]), int(ends[-1])
        orders, lost, priced, saved = [], 0, 0, 0
        for group_set in sets:
            score = scores[group_set.name].detach().double().cpu()
            order = least_first(group_set, score, removed.get(group_set.name, []))
            orders.append(order)
            lost += torch.segment_reduce(score[order[begin:last]], "sum", lengths=starts.diff())
            priced += plan.savings.priced[group_set.name][starts].diff()
            saved += plan.savings.first[group_set.name][starts].diff()
        prices = (lost / priced.clamp(min=torch.finfo(torch.float64).tiny)).cummax(0).values
        return cls(orders, begin, ends, prices, saved)


def least_first(group_set: GroupSet, score: Tensor, removed: list[int]) -> Tensor:
    """All groups in the order of removal: first those already removed, then by score, with the order of `balance`."""
    score = score.clone()
    score[torch.tensor(group_set.pinned, dtype=torch.long)] = torch.inf
    score[torch.tensor(removed, dtype=torch.long)] = -torch.inf
    if not group_set.balance:
        return score.sort(stable=True).indices
    order = score.view(-1, group_set.balance).sort(dim=1, stable=True).indices
    return (order + torch.arange(0, group_set.count, group_set.balance).unsqueeze(1)).t().flatten()
