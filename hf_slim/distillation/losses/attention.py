"""Losses on attention: relations among queries, keys and values, and attention maps; summed over positions."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimConfigError, SlimError
from hf_slim.distillation.capture.attention_states import AttentionState

BLOCK = 2**20  # float32 relations computed at a time: 4 MB per tensor, which fits in a CPU's cache
ACCELERATOR_BLOCKS = 16  # blocks at a time on an accelerator, where starting a kernel takes longer than memory access
MAP_LOSSES = ("kl", "mse")
LOSSES = ("relations", "maps")


@dataclass(frozen=True)
class AttentionConfig(SlimConfig):
    """The loss that compares the attention of student and teacher, its layers, and its weight."""

    loss: str = field(default="relations", metadata={"choices": LOSSES})
    """The loss: `relations` compares similarities among queries, among keys and among values; the numbers of heads may
    differ. `maps` compares attention probabilities; they are averaged over heads if the numbers of heads differ."""

    layers: str | dict[int, int] = "last"
    """Which layers are compared: `last`, or a mapping from layers of the student to layers of the teacher, counted
    from 0; negative numbers count from the end."""

    relation_heads: int | None = None
    """Number of parts that the joined queries, keys and values are split into for `relations`; it must divide their
    widths in both models. `null`: the largest number, up to the student's heads, that divides them all."""

    weight: float = 1.0
    """Weight of this loss, a positive number; the divergence of the outputs has the weight that `losses` gives it, 1
    by default."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise SlimConfigError(f"`attention.loss` must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
        if not isinstance(self.weight, (int, float)) or not 0 < self.weight < math.inf:
            raise SlimConfigError(f"`attention.weight` must be a positive number, got {self.weight!r}.")
        if self.layers != "last":
            try:  # JSON and YAML may have turned the numbers into strings
                mapping = {int(student): int(teacher) for student, teacher in self.layers.items()}
            except (AttributeError, TypeError, ValueError) as error:
                hint = "It must be 'last', or map layers of the student to layers of the teacher."
                raise SlimConfigError(f"`attention.layers` is {self.layers!r}. {hint}") from error
            object.__setattr__(self, "layers", mapping)

    @property
    def layer_pairs(self) -> dict[int, int]:
        """Student layer -> teacher layer."""
        return {-1: -1} if self.layers == "last" else self.layers


def attention_sum(
    student: list[AttentionState],
    teacher: list[AttentionState],
    weights: Tensor,
    config: AttentionConfig,
    causal: bool,
) -> Tensor:
    """Loss that `config` names: a weighted sum over positions, a mean over layers.

    Args:
        student: States of the compared layers.
        teacher: States of the teacher's layers, in the same order.
        weights: `(batch, length)`, weights of the positions; 0 for padding.
        config: Which loss, and the number of relation heads.
        causal: Whether a position attends only to itself and earlier ones.
    Returns: a scalar.
    Raises: SlimError: see `relation_loss` and `map_loss`.
    """
    total = 0
    for ours, theirs in zip(student, teacher, strict=True):
        if config.loss == "maps":
            total = total + states_map_loss(ours, theirs, weights)
        else:
            parts = config.relation_heads or _common_parts(ours, theirs)
            total = total + relation_loss(ours, theirs, weights, parts, causal)
    return total / len(student)


def _common_parts(student: AttentionState, teacher: AttentionState) -> int:
    """Largest number, up to the student's heads, that divides the joined widths of all states."""
    states = [*student.tensors.values(), *teacher.tensors.values()]
    common = math.gcd(*(state.shape[1] * state.shape[-1] for state in states))
    return max(parts for parts in range(1, student.query.shape[1] + 1) if common % parts == 0)


def relation_loss(
    student: AttentionState, teacher: AttentionState, valid: Tensor, relation_heads: int, causal: bool = False
) -> Tensor:
    """KL divergence between the relations that teacher and student have among queries, among keys and among values.

    Queries, keys and values are each joined over their heads and split into `relation_heads` parts. In each part the
    relation of position `t` to all positions is the softmax of their scaled dot products. The loss is
    `KL(teacher || student)` of these distributions in nats, averaged over parts, summed over valid positions and over
    query-query, key-key and value-value. Student and teacher may have different numbers of heads and different widths.
    Keys and values that several query heads share (grouped-query attention) count once.

    No tensor of size `(length, length)` is kept: the gradient is computed together with the loss, block by block.

    Args:
        student: Gets the gradient.
        teacher: Gets none; of the same batch and length.
        valid: `(batch, length)`, weight of each position `t`. Where it is 0 there is no token, and no position is
            related to it.
        relation_heads: Number of parts; must divide the joined widths of all states of both models.
        causal: Whether `t` is only related to positions up to its own, as in causal language models.
    Returns: a scalar, float32 (float64 for float64 states). Divide by the number of valid positions for the mean.
    Raises: SlimError: for shapes that do not fit.
    Source: Wang et al. 2021, MiniLMv2, arXiv:2012.15828, sec. 3.1, with equal weights and a sum over positions; the
        causal mask is not in the paper, which distils encoders.
    """
    total = torch.zeros((), device=valid.device)
    for name, state in student.tensors.items():
        ours = _split(state, relation_heads, f"student's {name} states")
        theirs = _split(teacher.tensors[name], relation_heads, f"teacher's {name} states")
        _check_same_inputs(ours, theirs, valid)
        total = total + _RelationKL.apply(ours, theirs.detach(), valid, causal)
    return total


def map_loss(student_map: Tensor, teacher_map: Tensor, valid: Tensor, kind: str = "kl") -> Tensor:
    """Distance between the attention probabilities of teacher and student, averaged over heads, summed over positions.

    Where the numbers of heads differ, both maps are first averaged over their heads. Probabilities of positions that
    are not valid are dropped, and each row is normalised to sum 1 again.

    Args:
        student_map: Attention probabilities `(batch, heads, length, length)`; gets the gradient.
        teacher_map: `(batch, teacher_heads, length, length)`; gets none.
        valid: `(batch, length)`, weights of the positions; 0 where there is no token.
        kind: "kl", `KL(teacher || student)` of each row in nats, or "mse", its squared differences averaged over
            valid positions.
    Returns: a scalar, float32 (float64 for float64 maps).
    Raises: SlimError: for shapes that do not fit, or an unknown kind.
    Source: "kl": Wang et al. 2020, MiniLM, arXiv:2002.10957, eq. 5. "mse": after Jiao et al. 2020, TinyBERT,
        arXiv:1909.10351, eq. 7, which compares scores before the softmax; here they are probabilities.
    """
    if kind not in MAP_LOSSES:
        raise SlimError(f"`kind` must be one of {', '.join(MAP_LOSSES)}, got {kind!r}.")
    if student_map.shape[1] != teacher_map.shape[1]:
        student_map, teacher_map = (maps.mean(1, keepdim=True) for maps in (student_map, teacher_map))
    _check_same_inputs(student_map, teacher_map, valid)
    rows = valid.bool()
    ours, theirs = (_on_valid(maps, rows) for maps in (student_map, teacher_map.detach()))
    if kind == "kl":
        smallest = torch.finfo(ours.dtype).tiny  # a probability may be 0 in a narrower dtype
        distance = (torch.xlogy(theirs, theirs) - theirs * ours.clamp_min(smallest).log()).sum(-1)
    else:
        distance = (ours - theirs).square().sum(-1) / rows.sum(-1).clamp_min(1)[:, None, None]
    return (distance.mean(1) * valid).sum()


def states_map_loss(student: AttentionState, teacher: AttentionState, valid: Tensor, kind: str = "kl") -> Tensor:
    """`map_loss` of the maps computed from recorded states; the maps are recomputed in the backward pass, not kept.

    Args:
        student: Gets the gradient.
        teacher: Gets none; of the same batch and length.
        valid: `(batch, length)`, weights of the positions; 0 where there is no token.
        kind: "kl" or "mse"; see `map_loss`.
    Raises: SlimError: see `map_loss` and `AttentionState.attention_map`.
    """

    def loss() -> Tensor:
        with torch.no_grad():
            teacher_map = teacher.attention_map()
        return map_loss(student.attention_map(), teacher_map, valid, kind)

    return checkpoint(loss, use_reentrant=False, preserve_rng_state=False)


class _RelationKL(torch.autograd.Function):
    # Loss and gradient are computed in one pass. Both factors of the score matrix S = A A^T are the student's states
    # A, so with G = dL/dS the gradient is (G + G^T) A. A block of rows of G contributes to both products.
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, valid: Tensor, causal: bool) -> Tensor:
        ours, theirs = (x if x.dtype == torch.float64 else x.float() for x in (student, teacher))
        _, heads, length, width = ours.shape
        total, gradient = ours.new_zeros(()), torch.zeros_like(ours)
        with torch.autocast(ours.device.type, enabled=False):
            for rows in torch.arange(length, device=ours.device).split(_rows_at_once(ours)):
                student_log, teacher_log = (_log_relations(x, rows, valid.bool(), causal) for x in (ours, theirs))
                teacher_share = teacher_log.exp()
                counted = valid[:, None, rows, None]
                total += (teacher_share * (teacher_log - student_log) * counted).sum() / heads
                if ctx.needs_input_grad[0]:
                    scores = student_log.exp_().sub_(teacher_share).mul_(counted / (heads * math.sqrt(width)))
                    gradient[:, :, rows] += scores @ ours
                    gradient += scores.mT @ ours[:, :, rows]
        ctx.save_for_backward(gradient.to(student.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def _rows_at_once(states: Tensor) -> int:
    batch, heads, length, _ = states.shape
    block = BLOCK if states.device.type == "cpu" else BLOCK * ACCELERATOR_BLOCKS
    return max(1, block // max(1, batch * heads * length))


def _log_relations(states: Tensor, rows: Tensor, valid: Tensor, causal: bool) -> Tensor:
    """Logarithms of the relations of positions `rows` to all positions, `(batch, heads, n_rows, length)`."""
    scores = states[:, :, rows] @ states.mT / math.sqrt(states.shape[-1])
    hidden = ~valid[:, None, None, :]
    if causal:
        hidden = hidden | (torch.arange(states.shape[-2], device=rows.device) > rows[:, None])
    # finite, so that a masked pair gives 0 * 0 instead of 0 * inf, and a fully masked row is not NaN
    return scores.masked_fill_(hidden, torch.finfo(scores.dtype).min / 4).log_softmax(-1)


def _split(states: Tensor, parts: int, name: str) -> Tensor:
    """`(batch, heads, length, head_dim)` joined over heads and split into `(batch, parts, length, width)`."""
    batch, heads, length, head_dim = states.shape
    width = heads * head_dim
    if not isinstance(parts, int) or parts < 1 or width % parts:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise SlimConfigError(
            f"`relation_heads` {parts!r} does not divide the width {width} of the {name} ({heads} heads of "
            f"{head_dim}). It must divide the widths of the queries, keys and values of both models; here: {divisors}."
        )
    return states.transpose(1, 2).reshape(batch, length, parts, width // parts).transpose(1, 2)


def _on_valid(maps: Tensor, valid: Tensor) -> Tensor:
    wide = (maps if maps.dtype == torch.float64 else maps.float()) * valid[:, None, None, :]
    return wide / wide.sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)


def _check_same_inputs(student: Tensor, teacher: Tensor, valid: Tensor) -> None:
    shapes = [(x.shape[0], x.shape[-2]) for x in (student, teacher)] + [tuple(valid.shape)]
    if len(set(shapes)) > 1:
        raise SlimError(
            f"Student, teacher and mask have (batch, length) {shapes[0]}, {shapes[1]} and {shapes[2]}. "
            "All must be of the same inputs, because attention is compared position by position."
        )
