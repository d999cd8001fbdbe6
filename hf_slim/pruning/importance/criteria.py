"""Criteria: the importance of a group, computed from its weights, gradients and activations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_slim.core.registry import Registry
from hf_slim.pruning.importance.statistics import AngularDistance, Moments

TAIL = 4.0  # threshold of a large weight, relative to the mean absolute weight of its tensor
BULK_WEIGHT = 1e-3  # weight of the mean, which orders groups without large weights
PIECE = 2**19  # numbers that are processed at a time, so that they fit into the CPU cache


@dataclass(frozen=True)
class Evidence:
    """The data of one group set that a criterion can use.

    Attributes:
        weights: Blocks `(count, width, ...)`, one per tensor of the set.
        gradients: Gradients of `weights`, if the criterion needs them.
        reads: For each of `weights`, whether it reads the groups.
        inputs: Statistics of the inputs of weights that read the groups, if needed; channels as `(count, width)`.
        angular_distance: Angle between input and output of a whole layer, if needed.
        seed: Random seed of this set, the same in every process and run.
    """

    weights: list[Tensor]
    gradients: list[Tensor] = field(default_factory=list)
    reads: list[bool] = field(default_factory=list)
    inputs: list[Moments] = field(default_factory=list)
    angular_distance: AngularDistance | None = None
    seed: int = 0

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.weights[0])

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Weights with their gradients."""
        return list(zip(self.weights, self.gradients, strict=True))

    @property
    def reading(self) -> list[tuple[Tensor, Moments]]:
        """The weights that read the groups, with the statistics of their inputs."""
        reading = [weight for weight, reads in zip(self.weights, self.reads, strict=True) if reads]
        return list(zip(reading, self.inputs, strict=True))


@dataclass(frozen=True)
class Criterion:
    """A way to score groups.

    Attributes:
        score: Evidence -> `(count,)`, float32.
        needs_gradient: Whether it uses gradients.
        sums: Names of the sums in `statistics.SUMS` over activations that it uses.
        needs_angular_distance: Whether it uses `Evidence.angular_distance`; then it scores only whole layers.
        comparable: Whether scores of different layers are on one scale. If not, they are divided by the layer's mean
            before layers are ranked together.
    """

    score: Callable[[Evidence], Tensor]
    needs_gradient: bool = False
    sums: tuple[str, ...] = ()
    needs_angular_distance: bool = False
    comparable: bool = False

    @property
    def looks_inside(self) -> bool:
        """Whether it needs statistics of forward passes."""
        return bool(self.sums) or self.needs_angular_distance


CRITERIA: Registry[Criterion] = Registry("pruning criterion")


def taylor(evidence: Evidence) -> Tensor:
    """First-order estimate of the loss change, weight by weight: the sum of |weight * gradient| over the group.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8, per element and summed over the group.
    """
    return sum(place_sums(Tensor.abs_, *pair).sum(1) for pair in evidence.pairs)


def taylor_sum(evidence: Evidence) -> Tensor:
    """First-order loss change for the group as a whole: the absolute value of the sum of weight * gradient.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8.
    """
    return _moved(evidence.pairs).abs()


def fisher(evidence: Evidence) -> Tensor:
    """Second-order estimate of the loss change, with squared gradients as the Hessian: half the sum of (w g)^2.

    Source: LeCun et al. 1990, Optimal Brain Damage, eq. 5; Theis et al. 2018, arXiv:1801.05787, eq. 8.
    """
    return sum(place_sums(Tensor.square_, *pair).sum(1) for pair in evidence.pairs) / 2


def fisher_mask(evidence: Evidence) -> Tensor:
    """Second-order estimate of the loss change for a mask over the groups: half the squared gradient of the mask.

    The gradient of a mask entry is the sum of weight * gradient over the columns that read the group; whole layers are
    masked at their outputs. The scores are averaged over batches.
    Source: Kwon et al. 2022, arXiv:2204.09656, eq. 6-8.
    """
    reading = [pair for pair, reads in zip(evidence.pairs, evidence.reads, strict=True) if reads]
    return _moved(reading or evidence.pairs).square() / 2


def movement(evidence: Evidence) -> Tensor:
    """How much training enlarges the weights of the group: minus the sum of weight * gradient, averaged over steps.

    Source: Sanh et al. 2020, arXiv:2005.07683, eq. 3, with the mean over steps instead of the sum.
    """
    return -_moved(evidence.pairs)


def l1(evidence: Evidence) -> Tensor:
    """Sum of the absolute weights of the group.

    It ignores activations. For feed-forward neurons of a language model, it removes a few neurons on which the whole
    model depends. It can be used for encoders, and for gradual pruning with steps to recover.
    Source: Li et al. 2017, arXiv:1608.08710, sec. 3.1.
    """
    return sum(place_sums(Tensor.abs_, weight).sum(1) for weight in evidence.weights)


def l2(evidence: Evidence) -> Tensor:
    """Euclidean norm of the weights of the group; it has the weakness of `l1`.

    Source: Li et al. 2017, arXiv:1608.08710, who compare it with the L1 norm.
    """
    return sum(place_sums(Tensor.square_, weight).sum(1) for weight in evidence.weights).sqrt()


def peak(evidence: Evidence) -> Tensor:
    """The largest absolute weight of the group, divided by the mean absolute weight of its tensor.

    It keeps the neurons with few, very large weights, which `l1` and `l2` may remove.
    Source: this project.
    """
    matrices = [(weight, range(1, weight.dim())) for weight in evidence.weights if weight[0, 0].numel() > 1]
    peaks = [torch.maximum(matrix.amax(list(dims)), -matrix.amin(list(dims))).float() for matrix, dims in matrices]
    return torch.stack([each / each.mean() for each in peaks]).amax(0)


def l1_tail(evidence: Evidence) -> Tensor:
    """L1 norm of the part of each weight that exceeds four times the mean absolute weight of its tensor.

    The neurons on which a language model depends most have few, very large weights, which hardly change a norm over
    all weights. Groups without such weights are ordered by their mean absolute weight.
    Source: this project, by measuring with recipes/benchmarks/pruning_criteria.py.
    """
    return sum(tail.sum(1) + BULK_WEIGHT * bulk for tail, bulk in _tails(evidence))


def l2_tail(evidence: Evidence) -> Tensor:
    """Euclidean norm of the part of each weight that exceeds four times the mean absolute weight of its tensor.

    Source: this project, by measuring with recipes/benchmarks/pruning_criteria.py.
    """
    return sum(tail.norm(dim=1) + BULK_WEIGHT * bulk for tail, bulk in _tails(evidence))


def _tails(evidence: Evidence) -> Iterator[tuple[Tensor, Tensor]]:
    """For each matrix, divided by its mean: the part of each weight above `TAIL`, and the mean of each group."""
    for weight in evidence.weights:
        if weight[0, 0].numel() > 1:
            relative = weight.float().abs().flatten(1)
            relative /= relative.mean()
            yield (relative - TAIL).clamp_min_(0), relative.mean(1)


def activation(evidence: Evidence) -> Tensor:
    """Mean absolute activation of the group.

    Source: Muralidharan et al. 2024, Minitron, arXiv:2407.14679, sec. 2.2.
    """
    return sum((moments.absolute / moments.tokens).sum(1) for moments in evidence.inputs)


def wanda(evidence: Evidence) -> Tensor:
    """Sum of |weight| times the norm of its input. Source: Sun et al. 2024, Wanda, arXiv:2306.11695, eq. 1."""
    return sum(
        (place_sums(Tensor.abs_, weight) * moments.square.sqrt()).sum(1) for weight, moments in evidence.reading
    )


def flap(evidence: Evidence) -> Tensor:
    """Variance of the group's activation times the squared norm of the weights that read it.

    Source: An et al. 2024, FLAP, arXiv:2312.11983, eq. 5.
    """
    return sum((place_sums(Tensor.square_, weight) * moments.variance).sum(1) for weight, moments in evidence.reading)


def angular(evidence: Evidence) -> Tensor:
    """Angular distance between the input and the output of a whole layer, in [0, 1], averaged over tokens.

    Source: Gromov et al. 2024, arXiv:2403.17887, eq. 5-7 with n = 1; they take the last token of each text.
    """
    return (evidence.angular_distance.angle / evidence.angular_distance.tokens).reshape(1)


def random(evidence: Evidence) -> Tensor:
    """A random order, the same in every step, run and process.

    Source: none; it is the baseline for every other criterion.
    """
    return torch.rand(evidence.count, generator=torch.Generator().manual_seed(evidence.seed))


def place_sums(change_: Callable[[Tensor], Tensor], *factors: Tensor) -> Tensor:
    """For every index of every group, the sum of `change_(product of factors)` over the other dimensions.

    Args:
        change_: An elementwise function that may work in place.
        factors: One or two blocks `(count, width, ...)`.
    Returns: `(count, width)`, float32.
    """
    first = factors[0]
    # the dimensions in the order of memory, so that every piece is read sequentially
    order = sorted(range(first.dim()), key=lambda dim: (first.shape[dim] > 1, first.stride(dim)), reverse=True)
    permuted = [factor.permute(order) for factor in factors]
    rows = max(1, PIECE * len(permuted[0]) // max(1, first.numel()))
    total = first.new_zeros(first.shape[:2], dtype=torch.float32)
    target = total if order.index(0) < order.index(1) else total.t()
    summed = [index for index, dim in enumerate(order) if dim > 1]
    for start in range(0, len(permuted[0]), rows):
        parts = [factor[start : start + rows] for factor in permuted]
        piece = change_(parts[0] * parts[1] if len(parts) == 2 else parts[0].clone())
        into = target if order[0] > 1 else target[start : start + rows]
        into.add_(piece.sum(summed, dtype=torch.float32))
    return total


def _moved(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(place_sums(lambda product: product, *pair).sum(1) for pair in pairs)


CRITERIA.register("taylor")(Criterion(taylor, needs_gradient=True, comparable=True))
CRITERIA.register("taylor_sum")(Criterion(taylor_sum, needs_gradient=True, comparable=True))
CRITERIA.register("fisher")(Criterion(fisher, needs_gradient=True, comparable=True))
CRITERIA.register("fisher_mask")(Criterion(fisher_mask, needs_gradient=True, comparable=True))
CRITERIA.register("movement")(Criterion(movement, needs_gradient=True, comparable=True))
CRITERIA.register("l1")(Criterion(l1))
CRITERIA.register("l2")(Criterion(l2))
CRITERIA.register("l1_tail")(Criterion(l1_tail))
CRITERIA.register("l2_tail")(Criterion(l2_tail))
CRITERIA.register("peak")(Criterion(peak))
CRITERIA.register("activation")(Criterion(activation, sums=("absolute",)))
CRITERIA.register("wanda")(Criterion(wanda, sums=("square",)))
CRITERIA.register("flap")(Criterion(flap, sums=("total", "square")))
CRITERIA.register("angular")(Criterion(angular, needs_angular_distance=True, comparable=True))
CRITERIA.register("random")(Criterion(random))
