"""Which layers of the student are compared with which layers of the teachers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_value, main_input_name
from hf_slim.core.modules import device_of, evaluating
from hf_slim.core.record import unwrapped
from hf_slim.distillation.losses.hidden_states import PROJECTIONS, HiddenConfig, layer_map, projections_for
from hf_slim.distillation.teachers.live import LiveTeacher, hidden_states
from hf_slim.distillation.teachers.sharding import gathered

PROBE_LENGTH = 8


@dataclass(frozen=True)
class FollowedLayers:
    """The compared layers of the student and of each teacher.

    Attributes:
        layers: For each teacher: student layer -> teacher layer; 0 is the embedding.
        projections: From the student's width to the teachers' width; None if they are equal.
    """

    layers: Sequence[dict[int, int]]
    projections: nn.ModuleDict | None


def map_layers_(model: nn.Module, teachers: Sequence[LiveTeacher], config: HiddenConfig) -> FollowedLayers:
    """Map layers of the student to layers of the teachers, and add the projections that are needed to `model`.

    Projections are a submodule, so that the optimizer trains them and checkpoints contain them.

    Args:
        model: The student.
        teachers: At least one. All are run once on a few tokens, like the student.
        config: Which layers are compared.
    Raises: SlimError: if a layer does not exist, or the teachers' widths differ.
    """
    count, width = _layers_and_width(model)
    sizes = [_layers_and_width(teacher.model) for teacher in teachers]
    layers = [layer_map(config, count, teacher_count) for teacher_count, _ in sizes]
    widths = {teacher_width for _, teacher_width in sizes}
    if len(widths) > 1:
        raise SlimError(
            f"The teachers have hidden sizes {sorted(widths)}. With `hidden`, all teachers must have the same one."
        )
    projections = projections_for(layers[0], width, widths.pop())
    if projections is not None:
        projections.to(device_of(model))
        setattr(model, PROJECTIONS, projections)
    return FollowedLayers(layers, projections)


def remove_projections_(model: nn.Module) -> None:
    """Remove the projections, which are used in training only."""
    if PROJECTIONS in dict(model.named_children()):
        delattr(model, PROJECTIONS)


@torch.no_grad()
def _layers_and_width(model: nn.Module) -> tuple[int, int]:
    inner = unwrapped(model)
    with evaluating(inner), gathered(inner.parameters()):
        states = hidden_states(inner(**_some_inputs(inner), output_hidden_states=True))
    return len(states) - 1, states[-1].shape[-1]


def _some_inputs(model: nn.Module) -> dict[str, Tensor]:
    device = device_of(model)
    if main_input_name(model) not in (None, "input_ids"):
        return {name: value.to(device) for name, value in model.dummy_inputs.items()}
    ids = torch.ones((1, PROBE_LENGTH), dtype=torch.long, device=device)
    more = {"decoder_input_ids": ids} if config_value(model, "is_encoder_decoder", False) else {}
    return {"input_ids": ids} | more
