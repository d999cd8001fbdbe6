"""Task loss and distillation terms through the output layer, a few rows at a time, forward and backward at once.

Of logits as large as batch x length x vocabulary only a chunk exists at any time, of student and teacher alike. The
gradient of a chunk is at hand when its loss is, so that nothing is kept for the backward pass but the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_slim.core.modules import autocast_dtype
from hf_slim.distillation.losses.answers import Answers
from hf_slim.distillation.losses.divergences import Distribution, Divergence, TopK, over_buckets, top_k_of

CHUNK_BYTES = 2**25  # of logits in float32 for one matrix product: 170 rows of a vocabulary of 49152
BLOCK_BYTES = 2**20  # of them that are worked on at a time: what a dozen passes read and write stays in the cache


class Term(NamedTuple):
    """One divergence between the answers.

    Attributes:
        divergence: An entry of `DIVERGENCES`.
        parameter: What it takes beside the two distributions.
        weight: Its share of the total.
    """

    divergence: Divergence
    parameter: float
    weight: float


@dataclass(frozen=True)
class LogitLoss:
    """What is asked of the student's logits.

    Attributes:
        task_weight: Of the cross-entropy with the labels.
        terms: Of the teacher's answers.
        temperature: Of both distributions in the terms.
        top_k: Cuts the teacher's answers to so many classes and a tail; None: all classes.
    """

    task_weight: float
    terms: Sequence[Term]
    temperature: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True)
class Rows:
    """The positions of a flattened micro-batch that predict something.

    Attributes:
        places: `(n_rows,)`.
        labels: `(n_rows,)` classes.
        weights: `(n_rows,)` of the terms, not of the task; None: 1.
    """

    places: Tensor
    labels: Tensor
    weights: Tensor | None = None


class LogitSums(NamedTuple):
    """Sums over rows.

    Attributes:
        total: With the gradient: task and terms, each times its weight.
        task: Cross-entropy in nats, 0 if it has no weight.
        terms: `(n_terms,)`, before their weights and temperatures.
    """

    total: Tensor
    task: Tensor
    terms: Tensor


def logit_sums(
    states: Tensor, head: nn.Module | None, rows: Rows, teacher: Answers | None, loss: LogitLoss, n_classes: int
) -> LogitSums:
    """Task loss and terms, summed over rows.

    Args:
        states: `(positions, width)`, what enters the output layer; or the logits themselves.
        head: The output layer, called as a module on chunks: fake-quantized, adapted and tied ones stay right. None
            for logits.
        n_classes: Columns of the logits.
    """
    parameters = [p for p in head.parameters() if p.requires_grad] if head is not None else []
    # precision is the caller's: inside an autograd function the outer autocast would still hold, but not be seen
    return LogitSums(*_LogitSums.apply(_Work(head, rows, teacher, loss, n_classes, parameters), states, *parameters))


@dataclass(frozen=True)
class _Work:
    head: nn.Module | None
    rows: Rows
    teacher: Answers | None
    loss: LogitLoss
    n_classes: int
    parameters: list[nn.Parameter]

    def output(self) -> "_PlainOutput | _AnyOutput | _NoOutput":
        if self.head is None:
            return _NoOutput()
        hooked = self.head._forward_hooks or self.head._forward_pre_hooks or "forward" in vars(self.head)
        return _PlainOutput(self.head) if type(self.head) is nn.Linear and not hooked else _AnyOutput(self)


class _LogitSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, states: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, gradient = work.output(), torch.zeros_like(states)
        sums = torch.zeros(1 + len(work.loss.terms), device=states.device, dtype=_wide(states.dtype))
        rows = torch.arange(len(work.rows.places), device=states.device)
        for chunk in rows.split(max(1, CHUNK_BYTES // (4 * work.n_classes))):
            places = work.rows.places[chunk]
            logits = output.forward(states[places])
            teacher = work.teacher.at(places) if work.loss.terms else None
            by_logits = _chunk_gradient(logits, teacher, work, chunk, sums)
            gradient[places] = output.backward(by_logits).to(gradient.dtype)
        ctx.gradients = (gradient, *output.gradients(work.parameters))
        temperature_squared = work.loss.temperature**2
        total = work.loss.task_weight * sums[0]
        for term, value in zip(work.loss.terms, sums[1:], strict=True):
            total = total + term.weight * temperature_squared * value
        task, terms = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(task, terms)
        return total, task, terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The distillation loss keeps its gradients for one backward pass. Run forward again.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(g if g is None else g.mul_(upstream.to(g.dtype)) for g in gradients)


def _chunk_gradient(logits: Tensor, teacher: Answers | None, work: _Work, chunk: Tensor, sums: Tensor) -> Tensor:
    """Adds the chunk's losses to `sums` in place; the derivative of their weighted sum by the logits."""
    gradient = torch.empty_like(logits, dtype=_wide(logits.dtype))
    size = len(chunk) if logits.is_cuda else max(1, BLOCK_BYTES // (4 * work.n_classes))
    for start in range(0, len(chunk), size):
        block = slice(start, start + size)
        _fill_gradient(logits[block], teacher, block, work, chunk[block], sums, gradient[block])
    return gradient


def _fill_gradient(
    logits: Tensor, teacher: Answers | None, block: slice, work: _Work, rows: Tensor, sums: Tensor, gradient: Tensor
) -> None:
    """The same for one block of rows, written to `gradient`."""
    loss, temperature = work.loss, work.loss.temperature
    q = Distribution.of_logits(logits, 1.0)
    if loss.task_weight:
        labels = work.rows.labels[rows, None]
        sums[0] -= q.log.gather(-1, labels).sum()
        torch.mul(q.probabilities, loss.task_weight, out=gradient)
        gradient.scatter_add_(-1, labels, torch.full_like(labels, -loss.task_weight, dtype=gradient.dtype))
    else:
        gradient.zero_()
    if not loss.terms:
        return
    if temperature != 1:
        q = Distribution.of_logits(logits, temperature)
    answers = teacher.distribution(block, temperature)
    if loss.top_k is not None and not isinstance(answers, TopK):
        answers = top_k_of(answers, loss.top_k)
    for index, term in enumerate(loss.terms, 1):
        if isinstance(answers, TopK):
            value, by_logits = over_buckets(term.divergence, q, answers, term.parameter)
        else:
            value, by_logits = term.divergence(q, answers, term.parameter)
        if work.rows.weights is not None:
            weights = work.rows.weights[rows].to(value.dtype)
            value, by_logits = value * weights, by_logits.mul_(weights[:, None])
        sums[index] += value.sum()
        gradient.add_(by_logits, alpha=term.weight * temperature)  # T^2 for the loss, 1/T for the divided logits


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _NoOutput:
    """The logits were given."""

    def forward(self, states: Tensor) -> Tensor:
        return states

    def backward(self, by_logits: Tensor) -> Tensor:
        return by_logits

    def gradients(self, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        return []


class _PlainOutput:
    """A linear layer by its matrix products: gradients of its weights add up in one tensor."""

    def __init__(self, head: nn.Linear):
        self._head = head
        dtype = autocast_dtype(head.weight.device) or head.weight.dtype
        self._weight = head.weight.detach().to(dtype)
        self._bias = None if head.bias is None else head.bias.detach().to(dtype)
        self._states: Tensor | None = None
        self._by_weight: Tensor | None = None
        self._by_bias: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        self._states = states.to(self._weight.dtype)
        return nn.functional.linear(self._states, self._weight, self._bias)

    def backward(self, by_logits: Tensor) -> Tensor:
        narrow = by_logits.to(self._weight.dtype)
        if self._head.weight.requires_grad:
            self._add_weight_gradient(narrow)
        if self._bias is not None and self._head.bias.requires_grad:
            found = by_logits.sum(0)
            self._by_bias = found if self._by_bias is None else self._by_bias.add_(found)
        return narrow @ self._weight

    def _add_weight_gradient(self, by_logits: Tensor) -> None:
        if self._by_weight is None:
            self._by_weight = (by_logits.t() @ self._states).to(_wide(by_logits.dtype))
        elif self._by_weight.dtype == by_logits.dtype:
            self._by_weight.addmm_(by_logits.t(), self._states)
        else:
            self._by_weight.add_(by_logits.t() @ self._states)

    def gradients(self, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        found = {id(self._head.weight): self._by_weight}
        if self._bias is not None:
            found[id(self._head.bias)] = self._by_bias
        return [None if found[id(p)] is None else found[id(p)].to(p.dtype) for p in parameters]


class _AnyOutput:
    """Any other module, through autograd: fake-quantized, with adapters, or with hooks."""

    def __init__(self, work: _Work):
        self._head, self._parameters = work.head, work.parameters
        self._sums: list[Tensor | None] = [None] * len(work.parameters)

    def forward(self, states: Tensor) -> Tensor:
        self._states = states.detach().requires_grad_()
        with torch.enable_grad():
            self._logits = self._head(self._states)
        return self._logits.detach()

    def backward(self, by_logits: Tensor) -> Tensor:
        wanted = [self._states, *self._parameters]
        given = by_logits.to(self._logits.dtype)
        by_states, *others = torch.autograd.grad(self._logits, wanted, given, allow_unused=True)
        for index, found in enumerate(others):
            if found is not None:
                known = self._sums[index]
                self._sums[index] = found.contiguous() if known is None else known.add_(found)
        return by_states

    def gradients(self, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        return self._sums
