"""Scores of the groups of a model; a higher score means more important."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.pruning.groups import GroupSet, gradient_blocks, one_by_one, own_parameters, weight_blocks
from hf_slim.pruning.importance.criteria import CRITERIA, Criterion, Evidence
from hf_slim.pruning.importance.statistics import (
    AngularDistance,
    Moments,
    Predicate,
    always,
    readers,
    watched,
    watched_layers,
)

SCORE_MEMORY = 0.9  # weight of the past in the running mean of scores: about ten of them
Seen = dict[str, Moments] | dict[str, AngularDistance]  # path of a layer -> what was observed there


def sets_by_criterion(group_sets: Iterable[GroupSet], criterion: Mapping[str, str]) -> dict[str, list[GroupSet]]:
    """Criterion -> the group sets that it scores."""
    found: dict[str, list[GroupSet]] = {}
    for group_set in group_sets:
        found.setdefault(criterion[group_set.kind], []).append(group_set)
    return found


@contextmanager
def observed(
    model: nn.Module, group_sets: Iterable[GroupSet], criterion: Mapping[str, str], when: Predicate = always
) -> Iterator[dict[str, Seen]]:
    """Context that collects the statistics of forward passes that each criterion needs: criterion -> statistics."""
    with ExitStack() as watching:
        yield {
            name: watching.enter_context(_observed_by(name, model, sets, when))
            for name, sets in sets_by_criterion(group_sets, criterion).items()
        }


def score_all(
    model: nn.Module, group_sets: Iterable[GroupSet], criterion: Mapping[str, str], seen: dict[str, Seen] | None = None
) -> dict[str, Tensor]:
    """`score_groups` of every set by the criterion of its kind; `criterion` maps kind -> criterion."""
    scores: dict[str, Tensor] = {}
    for name, sets in sets_by_criterion(group_sets, criterion).items():
        scores |= score_groups(model, sets, name, (seen or {}).get(name))
    return scores


def not_finite(scores: Mapping[str, Tensor]) -> str | None:
    """The first group set with a score that is NaN or infinite, as after an overflow in half precision; None: none."""
    are_finite = [bool(torch.isfinite(score).all()) for score in scores.values()]
    return next((name for name, is_finite in zip(scores, are_finite, strict=True) if not is_finite), None)


def averaged(past: dict[str, Tensor], now: dict[str, Tensor], masked: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The running mean of scores: name -> `(count,)`, `SCORE_MEMORY` of the past and the rest of `now`.

    Args:
        past: The mean so far; empty at the start.
        masked: Group set name -> indices of masked groups, which keep their past score.
    """
    means = {}
    for name, score in now.items():
        if name in past:
            before = past[name].to(score.device)
            kept = torch.tensor(masked.get(name, []), dtype=torch.long, device=score.device)
            score[kept] = before[kept]
            score = before.lerp(score, 1 - SCORE_MEMORY)
        means[name] = score
    return means


def _observed_by(
    criterion: str, model: nn.Module, group_sets: list[GroupSet], when: Predicate
) -> AbstractContextManager[Seen]:
    """The statistics that one criterion needs; empty if it needs none.

    Raises: SlimError: if the criterion cannot score groups of some kind.
    """
    chosen = CRITERIA[criterion]
    for group_set in group_sets:
        _check_fits(criterion, group_set)
    if chosen.needs_angular_distance:
        return watched_layers(model, [path for group_set in group_sets for path in _layers(group_set)], when)
    return watched(model, readers(model, group_sets) if chosen.sums else [], chosen.sums, when)


def score_groups(
    model: nn.Module, group_sets: list[GroupSet], criterion: str, seen: Seen | None = None
) -> dict[str, Tensor]:
    """The importance of every group now: group set name -> `(count,)`, float32.

    Args:
        seen: Statistics from `observed`, for criteria that need them.
    Raises: SlimError: if the criterion cannot score groups of some kind, or if gradients or statistics that it needs
        are missing.
    """
    chosen = CRITERIA[criterion]
    scores = {}
    for group_set in group_sets:
        _check_fits(criterion, group_set)
        parts = [_evidence(model, part, chosen, seen) for part in one_by_one(group_set)]
        if chosen.needs_angular_distance:
            layers = zip(parts, _layers(group_set), strict=True)
            parts = [replace(part, angular_distance=_seen_at(path, seen)) for part, path in layers]
        score = torch.cat([chosen.score(part) for part in parts])
        scores[group_set.name] = score if chosen.comparable else score / score.mean()
    return scores


def _check_fits(criterion: str, group_set: GroupSet) -> None:
    chosen = CRITERIA[criterion]
    if group_set.is_depth and chosen.sums:
        raise SlimError(
            f"Criterion '{criterion}' uses activations of neurons and heads, and cannot score whole layers or blocks. "
            "Choose taylor, fisher or, for `layers`, angular."
        )
    if chosen.needs_angular_distance and not group_set.stack:
        raise SlimError(
            f"Criterion '{criterion}' compares input and output of whole layers, and cannot score {group_set.kind}. "
            "Choose another one, or prune only `layers` with it."
        )


def _layers(group_set: GroupSet) -> list[str]:
    return [f"{group_set.stack}.{index}" for index in range(group_set.count)]


def _evidence(model: nn.Module, group_set: GroupSet, criterion: Criterion, seen: Seen | None) -> Evidence:
    return Evidence(
        weights=weight_blocks(model, group_set),
        gradients=gradient_blocks(model, group_set) if criterion.needs_gradient else [],
        reads=[part.reads for part, _ in own_parameters(model, group_set)],
        inputs=_inputs(model, group_set, seen) if criterion.sums else [],
        seed=zlib.crc32(group_set.name.encode()),
    )


def _inputs(model: nn.Module, group_set: GroupSet, seen: Seen | None) -> list[Moments]:
    found = []
    for part, _ in own_parameters(model, group_set):
        if part.reads:
            moments = _seen_at(part.module, seen)
            sums = {name: value for name, value in vars(moments).items() if isinstance(value, Tensor)}
            places = part.places(range(group_set.count))
            found.append(replace(moments, **{name: value[places.to(value.device)] for name, value in sums.items()}))
    return found


def _seen_at(path: str, seen: Seen | None) -> Moments | AngularDistance:
    if not seen or path not in seen:
        raise SlimError(
            f"This criterion needs activations, and none of '{path}' were recorded. Use PruningCallback, or "
            "`hf_slim.prune(model, config, batches)` outside a Trainer."
        )
    return seen[path]
