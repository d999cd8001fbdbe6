"""Makes a student: chosen layers of a teacher, with the most important groups of their widths."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.errors import SlimConfigError
from hf_slim.core.running.calibration import calibrating
from hf_slim.integration.config_json import is_plain
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.importance.scores import score_groups
from hf_slim.pruning.one_shot import summed_scores
from hf_slim.pruning.removal.cut import Removed
from hf_slim.pruning.structure.find import UNSTACKED
from hf_slim.pruning.structure.probe import module_copy
from hf_slim.student.cut import Cut, choose_removed, cut_
from hf_slim.student.plan import plan_student
from hf_slim.student.shape import StudentShape
from hf_slim.student.structure import Structure, structure_of

BY_WEIGHTS = "l2_tail"  # a criterion without data after which a language model still works
WITHOUT_LOSS = dict.fromkeys(("ffn", "kv_heads", "heads", "hidden"), "wanda") | {"layers": "angular"}


def make_student(
    model: PreTrainedModel, shape: StudentShape | dict[str, Any], batches: Iterable[dict[str, Tensor]] | None = None
) -> PreTrainedModel:
    """A smaller copy of a teacher with its weights, or with random weights if `fresh`. The teacher is not changed.

    Kept layers, embeddings and head have the teacher's weights. Where a width becomes smaller, every layer keeps its
    most important groups. Importance is computed from the weights (l2_tail) without batches; by the default criterion
    of each kind from batches with `labels`; from activations (wanda; angular for layers) from batches without.

    Args:
        model: The teacher.
        shape: Layers and widths of the student, or its fields as a dictionary.
        batches: Keyword arguments of forward passes, from which importance is computed.
    Returns: a model whose config describes all its sizes, so `save_pretrained` writes an ordinary checkpoint.
    Raises: SlimError: before anything is computed, if the shape is impossible for the teacher or its config cannot
        describe it, or if batches are given and not needed.
    """
    shape = StudentShape.of(shape)
    structure = structure_of(model, shape)
    cuts = plan_student(structure, shape)
    check_data(cuts, shape, batches is not None)
    if shape.fresh:
        return fresh_student(structure, cuts, shape).to(model.dtype).train(model.training)
    student = copy.deepcopy(model).requires_grad_(True)  # a teacher may be frozen, but a student is trained
    become_student_(student, structure, cuts, shape, batches)
    return student


def become_student_(
    model: PreTrainedModel,
    structure: Structure,
    cuts: list[Cut],
    shape: StudentShape,
    batches: Iterable[dict[str, Tensor]] | None,
) -> Removed:
    """Turns a teacher into the student, in place. Returns the removed groups: group set name -> indices.

    Args:
        model: The teacher.
        structure: Structure of this model, or of the same model without weights.
        cuts: From `plan_student`.
        shape: Layers and widths of the student.
        batches: As for `make_student`.
    Raises: SlimConfigError: if the config cannot describe the kept layers.
    """
    removed = choose_removed(cuts, shape, importance_of(model, _scored(cuts, shape), batches))
    cut_(model, structure, cuts, removed)
    if not is_plain(model):
        raise SlimConfigError(
            f"{type(model.config).__name__} cannot describe the kept layers. Name other layers in `layers`."
        )
    return removed


def fresh_student(structure: Structure, cuts: list[Cut], shape: StudentShape) -> PreTrainedModel:
    """A student with random weights in float32, as `from_config` builds it.

    Args:
        structure: Structure of the teacher.
        cuts: From `plan_student`.
        shape: Layers and widths of the student.
    """
    smaller = module_copy(structure.twin)
    cut_(smaller, structure, cuts, choose_removed(cuts, shape))
    return type(smaller)(smaller.config)


def student_skeleton(model: PreTrainedModel, shape: StudentShape) -> PreTrainedModel:
    """A student with weights on the meta device, to find its sizes.

    Args:
        model: The teacher, with or without weights.
        shape: Layers and widths of the student.
    Raises: SlimConfigError: as `make_student`.
    """
    structure = structure_of(model, shape)
    cuts = plan_student(structure, shape)
    if shape.choose == "importance":  # the shape does not depend on which layers are kept
        shape = replace(shape, choose="first")
    smaller = module_copy(structure.twin)
    cut_(smaller, structure, cuts, choose_removed(cuts, shape))
    return smaller


def check_data(cuts: list[Cut], shape: StudentShape, is_given: bool) -> None:
    """Checks that data is given only if importance is computed from it.

    Args:
        cuts: From `plan_student`.
        shape: Layers and widths of the student.
        is_given: Whether there is data.
    Raises: SlimConfigError: if there is data and nothing is chosen by importance.
    """
    if is_given and (shape.fresh or not _scored(cuts, shape)):
        raise SlimConfigError(
            "Data was given, but nothing is chosen by it. Data is used for widths, and for layers if `choose` is "
            "importance, unless the student is `fresh`. Remove the data."
        )


def _scored(cuts: list[Cut], shape: StudentShape) -> list[GroupSet]:
    """Group sets of which the most important groups are kept."""
    smaller = [cut for cut in cuts if cut.kept is None and cut.n_kept < cut.group_set.count]
    return [cut.group_set for cut in smaller if not cut.group_set.stack or shape.choose == "importance"]


def importance_of(
    model: PreTrainedModel, group_sets: list[GroupSet], batches: Iterable[dict[str, Tensor]] | None
) -> dict[str, Tensor]:
    """Scores groups by importance: group set name -> `(count,)`; `make_student` names the criteria.

    Args:
        model: The teacher.
        group_sets: The groups to score.
        batches: As for `make_student`.
    """
    unstacked = [group_set for group_set in group_sets if group_set.kind == UNSTACKED or batches is None]
    scores = score_groups(model, unstacked, BY_WEIGHTS)
    others = [group_set for group_set in group_sets if group_set.name not in scores]
    if not others:
        return scores
    batches = list(batches)
    config = PruningConfig(criterion=None if all("labels" in batch for batch in batches) else WITHOUT_LOSS)
    with calibrating(model, batches) as run_batches:
        return scores | summed_scores(model, others, config, run_batches)
