"""Task loss and distillation terms through the output layer, with their gradients, for a few rows at a time.

The full logits `(batch * length, vocabulary)` never exist: student and teacher compute one chunk of rows at a time.
The gradient of a chunk is computed together with its loss, so only gradients are kept for the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_slim.core.modules import autocast_dtype
from hf_slim.distillation.losses.divergences import Distribution, Divergence, TopK, over_buckets, top_k_of
from hf_slim.distillation.losses.predictions import Predictions

CHUNK_BYTES = 2**25  # size of the float32 logits of one matrix product: 170 rows of a vocabulary of 49152
BLOCK_BYTES = 2**20  # size of the logits that the losses process at a time: a dozen passes over them use the cache


class Term(NamedTuple):
    """One divergence between the distributions of student and teacher.

    Attributes:
        divergence: An entry of `DIVERGENCES`.
        parameter: Third argument of the divergence.
        weight: Factor of this term in the total.
    """

    divergence: Divergence
    parameter: float
    weight: float


@dataclass(frozen=True)
class LogitLoss:
    """Loss on the student's logits.

    Attributes:
        task_weight: Factor of the cross-entropy with the labels; 0: it is not computed.
        terms: Divergences from the teacher.
        temperature: Both models' logits are divided by it in the terms; positive.
        top_k: Number of the teacher's most probable classes that are compared; all others form one class, the tail.
            None: all classes are compared.
    """

    task_weight: float
    terms: Sequence[Term]
    temperature: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True)
class Rows:
    """The positions of a flattened micro-batch that have a label.

    Attributes:
        places: `(n_rows,)`, positions in `[0, batch * length)`.
        labels: `(n_rows,)`, classes.
        weights: `(n_rows,)`, weights of the rows in the terms; the task loss does not use them. None: 1.
    """

    places: Tensor
    labels: Tensor
    weights: Tensor | None = None


class LogitSums(NamedTuple):
    """Sums over rows.

    Attributes:
        total: Scalar with a gradient: task loss and terms times their weights, terms also times temperature squared.
        task: Cross-entropy in nats; 0 if its weight is 0.
        terms: `(n_terms,)`, without their weights and without temperature squared.
    """

    total: Tensor
    task: Tensor
    terms: Tensor


def logit_sums(
    states: Tensor, head: nn.Module | None, rows: Rows, teacher: Predictions | None, loss: LogitLoss, n_classes: int
) -> LogitSums:
    """Task loss and terms, summed over rows.

    Args:
        states: `(positions, width)`, the input of the output layer; or the logits, `(positions, n_classes)`.
        head: The output layer. It is called as a module on chunks, so fake-quantized, adapted and tied layers give
            their own gradients. None if `states` are logits.
        rows: The positions that have a label.
        teacher: Predictions for the same micro-batch; None if there are no terms.
        loss: Weights and divergences.
        n_classes: Columns of the student's logits.
    Raises: RuntimeError: in a second backward pass, for which the gradients are not kept.
    """
    parameters = [p for p in head.parameters() if p.requires_grad] if head is not None else []
    # autocast is on inside the autograd function if the caller has turned it on, so precision is the caller's choice
    return LogitSums(*_LogitSums.apply(_Work(head, rows, teacher, loss, n_classes, parameters), states, *parameters))


@dataclass(frozen=True)
class _Work:
    head: nn.Module | None
    rows: Rows
    teacher: Predictions | None
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
            with torch.autocast(logits.device.type, enabled=False):
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


def _chunk_gradient(logits: Tensor, teacher: Predictions | None, work: _Work, chunk: Tensor, sums: Tensor) -> Tensor:
    """Compute the derivative of the chunk's weighted loss by its logits; add the losses to `sums` in place.

    Autocast is off meanwhile: it would compute products of probabilities in half precision.
    """
    gradient = torch.empty_like(logits, dtype=_wide(logits.dtype))
    size = len(chunk) if logits.is_cuda else max(1, BLOCK_BYTES // (4 * work.n_classes))
    for start in range(0, len(chunk), size):
        block = slice(start, start + size)
        q = Distribution.of_logits(logits[block], 1.0)
        _write_task_gradient(q, work, chunk[block], sums, gradient[block])
        if work.loss.terms:
            temperature = work.loss.temperature
            if temperature != 1:
                q = Distribution.of_logits(logits[block], temperature)
            p = teacher.distribution(block, temperature)
            _add_term_gradients(q, p, work, chunk[block], sums, gradient[block])
    return gradient


def _write_task_gradient(q: Distribution, work: _Work, rows: Tensor, sums: Tensor, gradient: Tensor) -> None:
    loss = work.loss
    if loss.task_weight:
        labels = work.rows.labels[rows, None]
        sums[0] -= q.log.gather(-1, labels).sum()
        torch.mul(q.probabilities, loss.task_weight, out=gradient)
        gradient.scatter_add_(-1, labels, torch.full_like(labels, -loss.task_weight, dtype=gradient.dtype))
    else:
        gradient.zero_()


def _add_term_gradients(
    q: Distribution, p: Distribution | TopK, work: _Work, rows: Tensor, sums: Tensor, gradient: Tensor
) -> None:
    loss = work.loss
    if loss.top_k is not None and not isinstance(p, TopK):
        p = top_k_of(p, loss.top_k)
    for index, term in enumerate(loss.terms, 1):
        if isinstance(p, TopK):
            value, by_logits = over_buckets(term.divergence, q, p, term.parameter)
        else:
            value, by_logits = term.divergence(q, p, term.parameter)
        if work.rows.weights is not None:
            weights = work.rows.weights[rows].to(value.dtype)
            value, by_logits = value * weights, by_logits.mul_(weights[:, None])
        sums[index] += value.sum()
        gradient.add_(by_logits, alpha=term.weight * loss.temperature)  # T^2 for the loss, 1/T for the divided logits


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _NoOutput:
    """No output layer: `states` are the logits."""

    def forward(self, states: Tensor) -> Tensor:
        return states

    def backward(self, by_logits: Tensor) -> Tensor:
        return by_logits

    def gradients(self, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        return []


class _PlainOutput:
    """A linear layer as matrix products, so that the gradient of its weight is accumulated in one tensor."""

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
        cast = by_logits.to(self._weight.dtype)
        if self._head.weight.requires_grad:
            self._add_weight_gradient(cast)
        if self._bias is not None and self._head.bias.requires_grad:
            found = by_logits.sum(0)
            self._by_bias = found if self._by_bias is None else self._by_bias.add_(found)
        return cast @ self._weight

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
    """Any other module, differentiated by autograd: fake-quantized, with adapters, or with hooks."""

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
                earlier = self._sums[index]
                self._sums[index] = found.contiguous() if earlier is None else earlier.add_(found)
        return by_states

    def gradients(self, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        return self._sums
