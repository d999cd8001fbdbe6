"""Which layers a student follows in its teachers, found by running both once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.modules import device_of, evaluating
from hf_slim.core.record import unwrapped
from hf_slim.distillation.losses.hidden_states import PROJECTIONS, HiddenConfig, layer_map, projections_for
from hf_slim.distillation.teachers.live import LiveTeacher, hidden_states
from hf_slim.distillation.teachers.sharding import gathered

PROBE_LENGTH = 8


@dataclass(frozen=True)
class Followed:
    """Layers of the student and of each teacher.

    Attributes:
        layers: For each teacher: student layer -> teacher layer, counted from the embedding.
        projections: From the student's width to the teachers'; None if they agree.
    """

    layers: Sequence[dict[int, int]]
    projections: nn.ModuleDict | None


def follow_(model: nn.Module, teachers: Sequence[LiveTeacher], config: HiddenConfig) -> Followed:
    """Maps the layers, and gives `model` the projections it needs: a submodule, so that it is trained and resumed.

    Raises: SlimError: if a layer does not exist, or teachers of several widths would need several projections.
    """
    count, width = _layers_and_width(model)
    sizes = [_layers_and_width(teacher.model) for teacher in teachers]
    layers = [layer_map(config, count, teacher_count) for teacher_count, _ in sizes]
    widths = {teacher_width for _, teacher_width in sizes}
    if len(widths) > 1:
        raise SlimError(f"The teachers have hidden widths {sorted(widths)}. For `hidden`, use teachers of one width.")
    projections = projections_for(layers[0], width, widths.pop())
    if projections is not None:
        projections.to(device_of(model))
        setattr(model, PROJECTIONS, projections)
    return Followed(layers, projections)


def forget_projections_(model: nn.Module) -> None:
    """Takes the projections away: they teach, and are no part of the trained model."""
    if hasattr(model, PROJECTIONS):
        delattr(model, PROJECTIONS)


@torch.no_grad()
def _layers_and_width(model: nn.Module) -> tuple[int, int]:
    inner = unwrapped(model)
    with evaluating(inner), gathered(inner.parameters()):
        states = hidden_states(inner(**_some_inputs(inner), output_hidden_states=True))
    return len(states) - 1, states[-1].shape[-1]


def _some_inputs(model: nn.Module) -> dict[str, Tensor]:
    device = device_of(model)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return {name: value.to(device) for name, value in model.dummy_inputs.items()}
    ids = torch.ones((1, PROBE_LENGTH), dtype=torch.long, device=device)
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids} | more
