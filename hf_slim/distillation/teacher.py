"""The model that teaches: frozen, in evaluation mode, outside of the student's parameters."""

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.modules import plain_copy

NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch", "return_dict", "use_cache")


def freeze_(teacher: nn.Module) -> nn.Module:
    """`teacher` in evaluation mode and without gradients."""
    return teacher.eval().requires_grad_(False)


def self_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of the student as it is now, without its preparation for quantization."""
    return freeze_(plain_copy(student))


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Raises SlimError if the teacher's answers do not fit the student's: another vocabulary or label set."""
    for name, what in (("vocab_size", "vocabulary"), ("num_labels", "label set")):
        sizes = [getattr(getattr(model, "config", None), name, None) for model in (student, teacher)]
        if sizes[0] != sizes[1] and None not in sizes:
            raise SlimError(
                f"The teacher has another {what} than the student: {name} {sizes[1]} against {sizes[0]}. "
                "Choose a teacher of the same family, with the same tokenizer and labels."
            )


@torch.no_grad()
def ask(teacher: nn.Module, inputs: dict, autocast_dtype: torch.dtype | None) -> Tensor:
    """The teacher's logits for the student's inputs.

    Args:
        inputs: The student's keyword arguments; labels are left out.
        autocast_dtype: Precision of the run, None for the teacher's own.
    Raises: SlimError: if the teacher answers NaN.
    """
    inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_TEACHER}
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    if next(teacher.parameters()).device != device:
        teacher.to(device)
    with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        logits = teacher(**inputs).logits
    if torch.isnan(logits).any():
        raise SlimError("The teacher answers NaN. Check its checkpoint, or run it in a wider dtype than fp16.")
    return logits
