"""How much a group matters: one score per group, higher is dearer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_slim.core.registry import Registry
from hf_slim.pruning.groups import GroupSet, gradient_blocks, weight_blocks


@dataclass(frozen=True)
class Criterion:
    """A way to score groups.

    Attributes:
        score: `(weight blocks, gradient blocks) -> (count,)` float32; blocks are `(count, width, other)`, one per
            part.
        needs_gradient: Whether gradient blocks are given; otherwise the list is empty.
        comparable: Whether scores of different layers are on one scale. If not, they are divided by the layer's mean
            before layers are ranked together.
    """

    score: Callable[[list[Tensor], list[Tensor]], Tensor]
    needs_gradient: bool
    comparable: bool


CRITERIA: Registry[Criterion] = Registry("pruning criterion")


def taylor(weights: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """First-order change of the loss if each weight of the group went: the sum of |weight * gradient|.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8, per element and summed over the group.
    """
    parts = zip(weights, gradients, strict=True)
    return sum((weight * gradient).abs_().sum(dim=(1, 2), dtype=torch.float32) for weight, gradient in parts)


def l1(weights: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Sum of the absolute weights of the group.

    Needs no gradient, and knows nothing of what flows through: on the feed-forward neurons of a language model it
    removes a few that everything depends on (SmolLM2, a quarter of them at once: perplexity 4.5 -> over 10,000, where
    `taylor` gives 6.7). Fit for encoders, and for gradual pruning with enough steps to recover.

    Source: Li et al. 2017, arXiv:1608.08710, sec. 3.1.
    """
    return sum(weight.abs().sum(dim=(1, 2), dtype=torch.float32) for weight in weights)


def l2(weights: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of the weights of the group; see `l1` for when not to use it."""
    return sum(weight.float().square().sum(dim=(1, 2)) for weight in weights).sqrt()


CRITERIA.register("taylor")(Criterion(taylor, needs_gradient=True, comparable=True))
CRITERIA.register("l1")(Criterion(l1, needs_gradient=False, comparable=False))
CRITERIA.register("l2")(Criterion(l2, needs_gradient=False, comparable=False))


def score_groups(model: nn.Module, group_sets: list[GroupSet], criterion: str) -> dict[str, Tensor]:
    """The importance of every group now: group set name -> `(count,)`, float32.

    Raises: SlimError: if the criterion needs gradients and a layer has none.
    """
    chosen = CRITERIA[criterion]
    scores = {}
    for group_set in group_sets:
        gradients = gradient_blocks(model, group_set) if chosen.needs_gradient else []
        score = chosen.score(weight_blocks(model, group_set), gradients)
        scores[group_set.name] = score if chosen.comparable else score / score.mean()
    return scores
