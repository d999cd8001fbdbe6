"""The parts of a teacher that can be removed, found without its weights."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.adapters import adapter_layers
from hf_slim.core.errors import SlimError
from hf_slim.core.record import is_prepared
from hf_slim.integration.config_json import is_plain
from hf_slim.pruning.groups import GroupSet, Refusal
from hf_slim.pruning.structure.example_inputs import example_inputs
from hf_slim.pruning.structure.find import UNSTACKED, understand
from hf_slim.pruning.structure.probe import weightless_twin
from hf_slim.student.shape import StudentShape

# setting -> kinds of groups; `hidden` also changes poolers, and GPT-2's config must then state the width of its ffn
KINDS_OF = {
    "layers": ["layers"], "hidden": ["hidden", "ffn", UNSTACKED], "heads": ["kv_heads", "heads"], "ffn": ["ffn"],
}  # fmt: skip
INNER = "inner"


@dataclass(frozen=True)
class Structure:
    """The parts of a teacher that can be removed.

    Attributes:
        twin: The teacher with weights on the meta device.
        group_sets: Group sets of the kinds that the shape changes.
        refusals: Reasons why other parts cannot be removed.
    """

    twin: nn.Module
    group_sets: list[GroupSet]
    refusals: list[Refusal]

    @property
    def config(self) -> Any:
        """The config of the teacher, or of its text part."""
        return self.twin.config.get_text_config()

    def of(self, kind: str) -> list[GroupSet]:
        """Group sets of one kind, such as "ffn"."""
        return [group_set for group_set in self.group_sets if group_set.kind == kind]


def structure_of(model: PreTrainedModel, shape: StudentShape) -> Structure:
    """Group sets of a teacher that the shape changes, found without its weights.

    Args:
        model: The teacher.
        shape: Determines which kinds of groups are needed.
    Raises: SlimError: if the teacher is quantized, prepared for a technique, wrapped in adapters, or has layers of
        different sizes.
    """
    name = type(model).__name__
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise SlimError(
            f"This {name} has packed integer weights, of which nothing can be removed. Use the float model."
        )
    if is_prepared(model) or adapter_layers(model):
        raise SlimError(f"This {name} is prepared for training or has adapters. `convert` it or merge them first.")
    if not is_plain(model):
        raise SlimError(f"The layers of this {name} differ in size, so no student of it has a plain config.")
    changes = ["layers"] if shape.layers is not None or shape.keep else []
    changes += [name for name, value in shape.widths.items() if value is not None]
    kinds = [kind for name in changes for kind in KINDS_OF[name]]
    found, refusals = understand(model, kinds=kinds) if kinds else ([], [])
    if "hidden" in kinds and not any(group_set.kind == "hidden" for group_set in found):
        found, refusals = _with_outputs_read(model, kinds)
    return Structure(weightless_twin(model), found, refusals)


class _WithReaders(nn.Module):
    """A model without a head plus linear layers on its outputs, so that the outputs can become narrower too."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner, self.config, self.main_input_name = model, model.config, model.main_input_name
        width = model.config.get_text_config().hidden_size
        self.readers = nn.ModuleDict({name: nn.Linear(width, 2) for name in ("last_hidden_state", "pooler_output")})

    def forward(self, **inputs: Tensor) -> Tensor:
        made = self.inner(**inputs)
        return sum(reader(made[name]) for name, reader in self.readers.items() if made.get(name) is not None)


def _with_outputs_read(model: nn.Module, kinds: list[str]) -> tuple[list[GroupSet], list[Refusal]]:
    """`understand` for a model without a head, whose outputs lose channels."""
    found, refusals = understand(_WithReaders(model), example_inputs(model), kinds)
    return [_without_readers(group_set) for group_set in found], refusals


def _without_readers(group_set: GroupSet) -> GroupSet:
    """A group set of `_WithReaders` with the names of the model inside it."""

    def own(path: str) -> str:
        return path.removeprefix(INNER).removeprefix(".")

    parts = [part for part in group_set.slices if part.tensor.startswith(f"{INNER}.")]
    return replace(
        group_set,
        name=own(group_set.name),
        slices=tuple(replace(part, tensor=own(part.tensor)) for part in parts),
        attributes=tuple((own(path), name) for path, name in group_set.attributes if path.startswith(INNER)),
        masked_norms=tuple(own(path) for path in group_set.masked_norms),
        stack=group_set.stack and own(group_set.stack),
    )
