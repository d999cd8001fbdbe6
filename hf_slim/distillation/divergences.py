"""Divergences between what teacher and student answer, each with its gradient in closed form.

Every entry takes log-probabilities `(rows, classes)` and gives the value per row and its derivative by the student's
logits. Autograd through the same formulas would keep three or four tensors of the logits' size where these make one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_slim.core.registry import Registry

# (student's log q, teacher's log p, the config's parameter) -> value (rows,), gradient by the logits (rows, classes)
Divergence = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
DIVERGENCES: Registry[Divergence] = Registry("distillation loss")
SMALLEST_MASS = 1e-9  # of a bucket: the logarithm of a tail without mass stays finite


@DIVERGENCES.register("forward_kl")
def forward_kl(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """KL(p || q): the student covers all that the teacher thinks possible. Hinton et al. 2015, arXiv:1503.02531."""
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p - log_q)
    return value, log_q.exp().sub_(p)


@DIVERGENCES.register("reverse_kl")
def reverse_kl(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """KL(q || p): the student leaves out what it cannot do well. Gu et al. 2024, MiniLLM, arXiv:2306.08543, eq. 1."""
    q, ratio = log_q.exp(), log_q - log_p
    value = torch.linalg.vecdot(q, ratio)
    return value, ratio.sub_(value[:, None]).mul_(q)


@DIVERGENCES.register("jensen_shannon")
def jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Agarwal et al. 2024, arXiv:2306.13649."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, beta)
    of_q = log_q - log_m
    distance = torch.linalg.vecdot(q, of_q)
    value = beta * torch.linalg.vecdot(p, log_p - log_m) + (1 - beta) * distance
    return value, of_q.sub_(distance[:, None]).mul_(q).mul_(1 - beta)


@DIVERGENCES.register("skewed_kl")
def skewed_kl(log_q: Tensor, log_p: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p || skew p + (1 - skew) q): never infinite. Ko et al. 2024, DistiLLM, arXiv:2402.03898, eq. 5."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, skew)
    value = torch.linalg.vecdot(p, log_p - log_m)
    slope = (log_p - log_m).exp_().mul_(skew - 1)
    return value, _by_logits(q, slope)


@DIVERGENCES.register("skewed_reverse_kl")
def skewed_reverse_kl(log_q: Tensor, log_p: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q || skew q + (1 - skew) p). Ko et al. 2024, DistiLLM, arXiv:2402.03898, sec. 3.1."""
    p, q = log_p.exp(), log_q.exp()
    ratio = log_q - _log_mixture(q, p, skew)
    value = torch.linalg.vecdot(q, ratio)
    return value, _by_logits(q, ratio - skew * ratio.exp())


@DIVERGENCES.register("total_variation")
def total_variation(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """Half the sum of |q - p|: the share of tokens on which both must differ. Wen et al. 2023, arXiv:2307.15190."""
    q = log_q.exp()
    difference = q - log_p.exp()
    return difference.abs().sum(-1) / 2, _by_logits(q, difference.sign_().div_(2))


@DIVERGENCES.register("universal")
def universal(log_q: Tensor, log_p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """Sum of |q - p| after sorting both: needs no common vocabulary. Boizard et al. 2024, arXiv:2402.12030, eq. 5.

    The classes may differ in number; the shorter list is filled up with zeros.
    """
    q, order = log_q.exp().sort(dim=-1, descending=True)
    p = log_p.exp().sort(dim=-1, descending=True).values
    shared = min(q.shape[-1], p.shape[-1])
    difference = q.clone()
    difference[:, :shared] -= p[:, :shared]
    value = difference.abs().sum(-1) + p[:, shared:].sum(-1)
    gradient = torch.empty_like(q).scatter_(-1, order, _by_logits(q, difference.sign_()))
    return value, gradient


def _log_mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    return torch.lerp(second, first, share).clamp_min_(torch.finfo(first.dtype).tiny).log_()


def _by_logits(q: Tensor, slope: Tensor) -> Tensor:
    """The derivative by logits from that by probabilities, `(rows, classes)` each: through the softmax."""
    return slope.sub_(torch.linalg.vecdot(q, slope)[:, None]).mul_(q)


@dataclass(frozen=True)
class TopK:
    """A teacher's answer cut to its likeliest classes; what is left of the mass is one more class, the tail.

    Attributes:
        ids: `(rows, k)`, distinct in a row.
        log_probabilities: `(rows, k)`.
    """

    ids: Tensor
    log_probabilities: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "TopK":
        return TopK(self.ids[rows], self.log_probabilities[rows])

    def buckets(self) -> Tensor:
        """Log-probabilities `(rows, k + 1)`; the tail comes last."""
        tail = (1 - self.log_probabilities.exp().sum(-1, keepdim=True)).clamp_min(SMALLEST_MASS)
        return torch.cat([self.log_probabilities, tail.log()], dim=-1)


def top_k_of(log_p: Tensor, k: int) -> TopK:
    """The `k` likeliest classes of every row."""
    found = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return TopK(found.indices, found.values)


def over_buckets(divergence: Divergence, log_q: Tensor, teacher: TopK, parameter: float) -> tuple[Tensor, Tensor]:
    """A divergence over the teacher's likeliest classes and the tail; value and gradient as without them.

    Args:
        log_q: `(rows, classes)`, all classes of the student.
    """
    if teacher.ids.shape[-1] == log_q.shape[-1]:  # no tail: what is left of the mass is rounding
        log_p = torch.empty_like(log_q).scatter_(-1, teacher.ids, teacher.log_probabilities.to(log_q.dtype))
        return divergence(log_q, log_p, parameter)
    rest = log_q.exp().scatter_(-1, teacher.ids, 0)
    tail = rest.sum(-1, keepdim=True).clamp_min_(SMALLEST_MASS)
    student = torch.cat([log_q.gather(-1, teacher.ids), tail.log()], dim=-1)
    value, gradient = divergence(student, teacher.buckets(), parameter)
    # a bucket's logit is the logsumexp of its classes', so its gradient is shared out by their shares of its mass
    spread = rest.mul_(gradient[:, -1:] / tail)
    return value, spread.scatter_(-1, teacher.ids, gradient[:, :-1])
