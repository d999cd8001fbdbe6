"""Divergences between the output distributions of teacher and student, each with its gradient in closed form.

Every entry of `DIVERGENCES` takes two distributions over `(rows, classes)`, does not change them, and returns the
value per row and its derivative with respect to the student's logits. Autograd through the same formulas would keep
three or four tensors of the size of the logits; these functions make one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_slim.core.registry import Registry

SMALLEST_MASS = 1e-9  # smallest probability of the tail, so that its logarithm is finite


class Distribution:
    """Probabilities of the classes and their logarithms. Each is computed once, on first use, for all losses.

    Args:
        log: `(rows, classes)`, logarithms of the probabilities; None if `logits` are given.
        logits: `(rows, classes)` in float32 or float64. Their softmax is faster than the exponential of its logarithm.
    """

    def __init__(self, log: Tensor | None = None, logits: Tensor | None = None):
        self._log, self._logits = log, logits

    @classmethod
    def of_logits(cls, logits: Tensor, temperature: float) -> "Distribution":
        """Softmax of `logits / temperature`.

        Args:
            logits: `(rows, classes)`, any float dtype; computed in float32, or float64 for float64.
            temperature: Positive.
        """
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return cls(logits=wide if temperature == 1 else wide / temperature)

    @cached_property
    def log(self) -> Tensor:
        """Logarithms of the probabilities, `(rows, classes)`, at most 0."""
        return torch.log_softmax(self._logits, dim=-1) if self._log is None else self._log

    @cached_property
    def probabilities(self) -> Tensor:
        """Probabilities, `(rows, classes)`; every row sums to 1."""
        return self.log.exp() if self._logits is None else torch.softmax(self._logits, dim=-1)


# (student, teacher, parameter) -> value (rows,), gradient with respect to the student's logits (rows, classes)
Divergence = Callable[[Distribution, Distribution, float], tuple[Tensor, Tensor]]
DIVERGENCES: Registry[Divergence] = Registry("distillation loss")


@DIVERGENCES.register("forward_kl")
def forward_kl(q: Distribution, p: Distribution, _: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || student): every class that is probable for the teacher must be probable for the student.

    Source: Hinton et al. 2015, arXiv:1503.02531, sec. 2.
    """
    value = torch.linalg.vecdot(p.probabilities, p.log - q.log)
    return value, q.probabilities - p.probabilities


@DIVERGENCES.register("reverse_kl")
def reverse_kl(q: Distribution, p: Distribution, _: float) -> tuple[Tensor, Tensor]:
    """KL(student || teacher): the student may concentrate on some of the teacher's probable classes.

    Source: Gu et al. 2024, MiniLLM, arXiv:2306.08543, eq. 1.
    """
    ratio = q.log - p.log
    value = torch.linalg.vecdot(q.probabilities, ratio)
    return value, ratio.sub_(value[:, None]).mul_(q.probabilities)


@DIVERGENCES.register("jensen_shannon")
def jensen_shannon(q: Distribution, p: Distribution, beta: float) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, with teacher p, student q.

    Source: Agarwal et al. 2024, GKD, arXiv:2306.13649.
    """
    log_m = _log_mixture(p, q, beta)
    of_q = q.log - log_m
    distance = torch.linalg.vecdot(q.probabilities, of_q)
    of_p = torch.sub(p.log, log_m, out=log_m)
    value = beta * torch.linalg.vecdot(p.probabilities, of_p) + (1 - beta) * distance
    return value, of_q.sub_(distance[:, None]).mul_(q.probabilities).mul_(1 - beta)


@DIVERGENCES.register("skewed_kl")
def skewed_kl(q: Distribution, p: Distribution, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p || skew p + (1 - skew) q), with teacher p and student q; it is always finite.

    Source: Ko et al. 2024, DistiLLM, arXiv:2402.03898, eq. 5.
    """
    of_p = p.log - _log_mixture(p, q, skew)
    value = torch.linalg.vecdot(p.probabilities, of_p)
    return value, _by_logits(q.probabilities, of_p.exp_().mul_(skew - 1))


@DIVERGENCES.register("skewed_reverse_kl")
def skewed_reverse_kl(q: Distribution, p: Distribution, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q || skew q + (1 - skew) p), with teacher p and student q; it is always finite.

    Source: Ko et al. 2024, DistiLLM, arXiv:2402.03898, sec. 3.1.
    """
    ratio = q.log - _log_mixture(q, p, skew)
    value = torch.linalg.vecdot(q.probabilities, ratio)
    return value, _by_logits(q.probabilities, ratio - skew * ratio.exp())


@DIVERGENCES.register("total_variation")
def total_variation(q: Distribution, p: Distribution, _: float) -> tuple[Tensor, Tensor]:
    """Half the sum of |student - teacher| over the classes.

    Source: Wen et al. 2023, arXiv:2307.15190.
    """
    difference = q.probabilities - p.probabilities
    return difference.abs().sum(-1) / 2, _by_logits(q.probabilities, difference.sign_().div_(2))


@DIVERGENCES.register("universal")
def universal(q: Distribution, p: Distribution, _: float) -> tuple[Tensor, Tensor]:
    """Sum of |student - teacher| after sorting both by probability, so that no common vocabulary is needed.

    The numbers of classes may differ; the shorter list is padded with zeros.
    Source: Boizard et al. 2024, arXiv:2402.12030, eq. 5.
    """
    ours, order = q.probabilities.sort(dim=-1, descending=True)
    theirs = p.probabilities.sort(dim=-1, descending=True).values
    shared = min(ours.shape[-1], theirs.shape[-1])
    difference = ours.clone()
    difference[:, :shared] -= theirs[:, :shared]
    value = difference.abs().sum(-1) + theirs[:, shared:].sum(-1)
    gradient = torch.empty_like(ours).scatter_(-1, order, _by_logits(ours, difference.sign_()))
    return value, gradient


def _log_mixture(first: Distribution, second: Distribution, share: float) -> Tensor:
    mixture = torch.lerp(second.probabilities, first.probabilities, share)
    return mixture.clamp_min_(torch.finfo(mixture.dtype).tiny).log_()


def _by_logits(q: Tensor, slope: Tensor) -> Tensor:
    """Turn `slope`, the derivative by probabilities, into that by logits, `(rows, classes)` each; changes `slope`."""
    return slope.sub_(torch.linalg.vecdot(q, slope)[:, None]).mul_(q)


@dataclass(frozen=True)
class TopK:
    """A teacher's most probable classes. The remaining probability is that of one more class, the tail.

    Attributes:
        ids: `(rows, k)`, the classes, distinct in a row.
        log_probabilities: `(rows, k)`, their log-probabilities.
    """

    ids: Tensor
    log_probabilities: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "TopK":
        return TopK(self.ids[rows], self.log_probabilities[rows])

    def buckets(self) -> Distribution:
        """Distribution over `k + 1` classes; the tail is the last one."""
        tail = (1 - self.log_probabilities.exp().sum(-1, keepdim=True)).clamp_min(SMALLEST_MASS)
        return Distribution(torch.cat([self.log_probabilities, tail.log()], dim=-1))


def top_k_of(p: Distribution, k: int) -> TopK:
    """Pick the `k` most probable classes of every row; all classes if there are fewer."""
    found = p.log.topk(min(k, p.log.shape[-1]), dim=-1)
    return TopK(found.indices, found.values)


def over_buckets(divergence: Divergence, q: Distribution, teacher: TopK, parameter: float) -> tuple[Tensor, Tensor]:
    """Value and gradient of a divergence over the teacher's most probable classes and the tail.

    Args:
        divergence: An entry of `DIVERGENCES`.
        q: Distribution of the student over all classes.
        teacher: The teacher's most probable classes.
        parameter: Third argument of the divergence.
    Returns: value `(rows,)` and gradient with respect to all logits of the student `(rows, classes)`.
    """
    log_q = q.log
    if teacher.ids.shape[-1] == log_q.shape[-1]:  # no tail: the remaining probability is a rounding error
        log_p = torch.empty_like(log_q).scatter_(-1, teacher.ids, teacher.log_probabilities.to(log_q.dtype))
        return divergence(q, Distribution(log_p), parameter)
    rest = q.probabilities.scatter(-1, teacher.ids, 0)
    tail = rest.sum(-1, keepdim=True).clamp_min_(SMALLEST_MASS)
    student = Distribution(torch.cat([log_q.gather(-1, teacher.ids), tail.log()], dim=-1))
    value, gradient = divergence(student, teacher.buckets(), parameter)
    # the tail's logit is the logsumexp of its classes' logits, so each class gets its share of the tail's gradient
    spread = rest.mul_(gradient[:, -1:] / tail)
    return value, spread.scatter_(-1, teacher.ids, gradient[:, :-1])
