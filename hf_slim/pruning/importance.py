"""How much a group matters: one score per group, higher is dearer."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.registry import Registry
from hf_slim.pruning.groups import GroupSet, gradient_blocks, one_by_one, reading_blocks, weight_blocks
from hf_slim.pruning.statistics import Moments


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at, for one group set.

    Attributes:
        weights: Blocks `(count, width, other)`, one per tensor that takes part.
        gradients: Likewise, where the criterion needs gradients.
        reading: The blocks of `weights` that read the groups, one per reading layer.
        inputs: What flows into each of them, where the criterion needs it; channels as `(count, width)`.
        seed: Of this set, the same in every process and run.
    """

    weights: list[Tensor]
    gradients: list[Tensor] = field(default_factory=list)
    reading: list[Tensor] = field(default_factory=list)
    inputs: list[Moments] = field(default_factory=list)
    seed: int = 0

    @property
    def count(self) -> int:
        return len(self.weights[0])


@dataclass(frozen=True)
class Criterion:
    """A way to score groups.

    Attributes:
        score: Evidence -> `(count,)`, float32.
        needs_gradient: Whether it looks at gradients.
        needs_inputs: Whether it looks at what flows through.
        comparable: Whether scores of different layers are on one scale. If not, they are divided by the layer's mean
            before layers are ranked together.
    """

    score: Callable[[Evidence], Tensor]
    needs_gradient: bool = False
    needs_inputs: bool = False
    comparable: bool = False


CRITERIA: Registry[Criterion] = Registry("pruning criterion")


def taylor(evidence: Evidence) -> Tensor:
    """First-order change of the loss if each weight of the group went: the sum of |weight * gradient|.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8, per element and summed over the group.
    """
    return sum(
        (weight * gradient).abs_().sum(dim=(1, 2), dtype=torch.float32) for weight, gradient in _pairs(evidence)
    )


def taylor_sum(evidence: Evidence) -> Tensor:
    """First-order change of the loss if the whole group went: |the sum of weight * gradient|. Same source, eq. 8."""
    return _moved(evidence).abs()


def fisher(evidence: Evidence) -> Tensor:
    """Second-order change of the loss, with squared gradients as the Hessian's diagonal: half the sum of (w g)**2.

    Source: LeCun et al. 1990, Optimal Brain Damage, eq. 5; Theis et al. 2018, arXiv:1801.05787, eq. 8.
    """
    products = (weight * gradient for weight, gradient in _pairs(evidence))
    return sum(product.square_().sum(dim=(1, 2), dtype=torch.float32) for product in products) / 2


def movement(evidence: Evidence) -> Tensor:
    """How far training moves the group away from zero: minus the sum of weight * gradient, averaged over steps.

    Source: Sanh et al. 2020, arXiv:2005.07683, eq. 3 (with the mean of steps in the place of the sum).
    """
    return -_moved(evidence)


def l1(evidence: Evidence) -> Tensor:
    """Sum of the absolute weights of the group.

    Needs no gradient, and knows nothing of what flows through: on the feed-forward neurons of a language model it
    removes a few that everything depends on. Fit for encoders, and for gradual pruning with steps to recover.
    Source: Li et al. 2017, arXiv:1608.08710, sec. 3.1.
    """
    return sum(weight.abs().sum(dim=(1, 2), dtype=torch.float32) for weight in evidence.weights)


def l2(evidence: Evidence) -> Tensor:
    """Euclidean norm of the weights of the group; see `l1` for when not to use it."""
    return sum(weight.float().square().sum(dim=(1, 2)) for weight in evidence.weights).sqrt()


def peak(evidence: Evidence) -> Tensor:
    """The largest absolute weight of the group, relative to its tensor's mean: finds neurons that few weights drive.

    The magnitude that keeps a language model alive where `l1` and `l2` do not.
    """
    peaks = [weight.abs().amax(dim=(1, 2)).float() for weight in evidence.weights if weight.shape[2] > 1]
    return torch.stack([each / each.mean() for each in peaks]).amax(0)


def activation(evidence: Evidence) -> Tensor:
    """Mean absolute activation. Source: Muralidharan et al. 2024, Minitron, arXiv:2407.14679, sec. 2.2."""
    return sum((moments.absolute / moments.tokens).sum(1) for moments in evidence.inputs)


def wanda(evidence: Evidence) -> Tensor:
    """Sum of |weight| times the norm of what flows through it. Source: Sun et al. 2024, arXiv:2306.11695, eq. 1."""
    products = (
        weight.abs().sum(2, dtype=torch.float32) * moments.square.sqrt()
        for weight, moments in zip(evidence.reading, evidence.inputs, strict=True)
    )
    return sum(product.sum(1) for product in products)


def flap(evidence: Evidence) -> Tensor:
    """Variance of what flows through times the squared norm of its weights.

    Source: An et al. 2024, FLAP, arXiv:2312.11983, eq. 5.
    """
    products = (
        weight.float().square().sum(2) * moments.variance
        for weight, moments in zip(evidence.reading, evidence.inputs, strict=True)
    )
    return sum(product.sum(1) for product in products)


def random(evidence: Evidence) -> Tensor:
    """The same random order in every step, run and process: what other criteria have to beat."""
    return torch.rand(evidence.count, generator=torch.Generator().manual_seed(evidence.seed))


def _pairs(evidence: Evidence) -> zip:
    return zip(evidence.weights, evidence.gradients, strict=True)


def _moved(evidence: Evidence) -> Tensor:
    return sum((weight * gradient).sum(dim=(1, 2), dtype=torch.float32) for weight, gradient in _pairs(evidence))


CRITERIA.register("taylor")(Criterion(taylor, needs_gradient=True, comparable=True))
CRITERIA.register("taylor_sum")(Criterion(taylor_sum, needs_gradient=True, comparable=True))
CRITERIA.register("fisher")(Criterion(fisher, needs_gradient=True, comparable=True))
CRITERIA.register("movement")(Criterion(movement, needs_gradient=True, comparable=True))
CRITERIA.register("l1")(Criterion(l1))
CRITERIA.register("l2")(Criterion(l2))
CRITERIA.register("peak")(Criterion(peak))
CRITERIA.register("activation")(Criterion(activation, needs_inputs=True))
CRITERIA.register("wanda")(Criterion(wanda, needs_inputs=True))
CRITERIA.register("flap")(Criterion(flap, needs_inputs=True))
CRITERIA.register("random")(Criterion(random))


def score_groups(
    model: nn.Module, group_sets: list[GroupSet], criterion: str, moments: dict[str, Moments] | None = None
) -> dict[str, Tensor]:
    """The importance of every group now: group set name -> `(count,)`, float32.

    Args:
        moments: Reading layer -> what has flowed into it, for criteria that need it.
    Raises: SlimError: if the criterion needs gradients and a layer has none, or inputs and none have been seen.
    """
    chosen = CRITERIA[criterion]
    scores = {}
    for group_set in group_sets:
        if group_set.stack and chosen.needs_inputs:
            raise SlimError(
                f"Criterion '{criterion}' looks at what flows through neurons and heads, not through whole layers. "
                "Choose taylor or fisher for `layers`."
            )
        parts = (_evidence(model, part, chosen, moments) for part in one_by_one(group_set))
        score = torch.cat([chosen.score(evidence) for evidence in parts])
        scores[group_set.name] = score if chosen.comparable else score / score.mean()
    return scores


def _evidence(
    model: nn.Module, group_set: GroupSet, criterion: Criterion, moments: dict[str, Moments] | None
) -> Evidence:
    return Evidence(
        weights=weight_blocks(model, group_set),
        gradients=gradient_blocks(model, group_set) if criterion.needs_gradient else [],
        reading=reading_blocks(model, group_set) if criterion.needs_inputs else [],
        inputs=_inputs(group_set, moments) if criterion.needs_inputs else [],
        seed=zlib.crc32(group_set.name.encode()),
    )


def _inputs(group_set: GroupSet, moments: dict[str, Moments] | None) -> list[Moments]:
    found = []
    for part in group_set.slices:
        if not part.reads:
            continue
        if not moments or part.module not in moments:
            raise SlimError(
                f"No input of '{part.module}' has been seen, which this criterion needs. Use PruningCallback, or "
                "`hf_slim.prune(model, config, batches)` outside a Trainer."
            )
        seen, places = moments[part.module], part.places(range(group_set.count)).to(moments[part.module].total.device)
        found.append(Moments(seen.tokens, seen.total[places], seen.absolute[places], seen.square[places]))
    return found
