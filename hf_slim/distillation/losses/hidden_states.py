"""The loss on hidden states; a learned projection maps the student's width to the teacher's where they differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimConfigError
from hf_slim.core.registry import Registry

# states of student and teacher, `(..., width)` each -> distance per token, `(...)`
HIDDEN_LOSSES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("hidden-state loss")
PROJECTIONS = "distillation_projections"  # name of a submodule of the student during training


@dataclass(frozen=True)
class HiddenConfig(SlimConfig):
    """The loss that compares hidden states of student and teacher, its layers, and its weight.

    Where the widths differ, a linear projection is trained with the student and dropped at the end.
    """

    loss: str = field(default="cosine", metadata={"choices": HIDDEN_LOSSES})
    """Distance between the states of student and teacher, for each token: a registered hidden-state loss. `cosine`
    compares directions only; `mse` is the squared difference averaged over the width."""

    layers: str | dict[int, int] = "even"
    """Which layers are compared: `even` (every layer of the student with a teacher's layer at the same relative
    depth), `last`, or a mapping from layers of the student to layers of the teacher. 0 is the embedding; the highest
    number is the input of the output head."""

    weight: float = 1.0
    """Weight of this loss, a positive number; the divergence of the outputs has the weight that `losses` gives it, 1
    by default."""

    pooled: bool = False
    """Whether the mean over the tokens of a text is compared, as for sentence embeddings. `false` compares every
    token."""

    def __post_init__(self) -> None:
        HIDDEN_LOSSES[self.loss]
        if not isinstance(self.weight, (int, float)) or not 0 < self.weight < float("inf"):
            raise SlimConfigError(f"`hidden.weight` must be a positive number, got {self.weight!r}.")
        if isinstance(self.layers, str):
            if self.layers not in ("even", "last"):
                raise SlimConfigError(f"`hidden.layers` must be 'even', 'last' or a mapping, got '{self.layers}'.")
            return
        try:  # JSON and YAML may have turned the numbers into strings
            mapping = {int(student): int(teacher) for student, teacher in self.layers.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise SlimConfigError(
                f"`hidden.layers` must map layers of the student to layers of the teacher, got {self.layers!r}."
            ) from error
        if not mapping:
            raise SlimConfigError("`hidden.layers` is empty. Name at least one layer, or remove `hidden`.")
        object.__setattr__(self, "layers", mapping)


@HIDDEN_LOSSES.register("mse")
def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the states, averaged over the width.

    Source: Jiao et al. 2020, TinyBERT, arXiv:1909.10351, eq. 8.
    """
    return (student - teacher).square().mean(-1)


@HIDDEN_LOSSES.register("cosine")
def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine similarity of the states: their directions are compared, not their lengths.

    Source: Sanh et al. 2019, DistilBERT, arXiv:1910.01108, sec. 3.
    """
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def layer_map(config: HiddenConfig, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Student layer -> teacher layer; 0 is the embedding.

    Args:
        config: Gives `layers`.
        student_layers: Number of layers without the embedding.
        teacher_layers: The same of the teacher.
    Raises: SlimConfigError: if a layer does not exist.
    """
    if config.layers == "last":
        return {student_layers: teacher_layers}
    if config.layers == "even":
        return {layer: round(layer * teacher_layers / student_layers) for layer in range(student_layers + 1)}
    for layers, count, side in (
        (config.layers.keys(), student_layers, "student"),
        (config.layers.values(), teacher_layers, "teacher"),
    ):
        wrong = sorted(layer for layer in layers if not 0 <= layer <= count)
        if wrong:
            raise SlimConfigError(
                f"`hidden.layers` names layer {wrong[0]} of the {side}, which has the layers 0 (the embedding) to "
                f"{count}."
            )
    return dict(config.layers)


def projections_for(layers: Mapping[int, int], student_width: int, teacher_width: int) -> nn.ModuleDict | None:
    """One linear layer per compared layer from the student's width to the teacher's; None if the widths are equal.

    The initial weights are random and preserve norms on average. They come from a separate generator, so that the
    random numbers of the run, and its data order, are the same as without projections.

    Args:
        layers: Student layer -> teacher layer.
        student_width: Hidden size of the student.
        teacher_width: Hidden size of the teacher.
    """
    if student_width == teacher_width:
        return None
    generator = torch.Generator().manual_seed(0)
    made = nn.ModuleDict()
    for layer in layers:
        linear = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / student_width**0.5)
        made[str(layer)] = linear
    return made


def hidden_sum(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    layers: Mapping[int, int],
    token_weights: Tensor,
    config: HiddenConfig,
    projections: nn.ModuleDict | None = None,
) -> Tensor:
    """Distance of the hidden states: a weighted sum over tokens, a mean over layers.

    Args:
        student: Layer -> `(batch, length, width)`, for all keys of `layers`.
        teacher: Layer -> `(batch, length, teacher_width)`, for all values of `layers`.
        layers: Student layer -> teacher layer.
        token_weights: `(batch, length)`, 0 for padding; the weights of a text sum to its number of predictions.
        config: Gives the distance, and whether tokens are averaged first.
        projections: From `projections_for`.
    Returns: a float32 scalar.
    """
    total = token_weights.new_zeros((), dtype=torch.float32)
    for student_layer, teacher_layer in layers.items():
        ours = student[student_layer]
        if projections is not None:
            ours = projections[str(student_layer)](ours.to(projections[str(student_layer)].weight.dtype))
        theirs, weights = teacher[teacher_layer].detach(), token_weights
        ours, theirs = ours.float(), theirs.to(ours.device).float()
        if config.pooled:
            ours, theirs, weights = _pooled(ours, weights), _pooled(theirs, weights), weights.sum(1)
        total = total + (HIDDEN_LOSSES[config.loss](ours, theirs) * weights).sum()
    return total / len(layers)


def _pooled(states: Tensor, token_weights: Tensor) -> Tensor:
    share = token_weights / token_weights.sum(1, keepdim=True).clamp_min(torch.finfo(token_weights.dtype).tiny)
    return (states * share.to(states.dtype).unsqueeze(-1)).sum(1)  # no product of matrices, which autocast would round
