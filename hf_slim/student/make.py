"""A smaller model for distillation to start from: chosen layers of a teacher, cut to the widths that matter most."""

import copy
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.core.calibration import calibrating
from hf_slim.core.errors import SlimConfigError
from hf_slim.integration.config_json import is_plain
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.importance.scores import score_groups
from hf_slim.pruning.one_shot import summed_scores
from hf_slim.pruning.removal.cut import Removed
from hf_slim.pruning.structure.find import UNSTACKED
from hf_slim.pruning.structure.probe import module_copy
from hf_slim.student.cut import Cut, choose, cut_
from hf_slim.student.plan import plan_student
from hf_slim.student.shape import StudentShape
from hf_slim.student.structure import Structure, structure_of

BY_WEIGHTS = "l2_tail"  # the criterion that needs no data and leaves a language model alive
WITHOUT_LOSS = dict.fromkeys(("ffn", "kv_heads", "heads", "hidden"), "wanda") | {"layers": "angular"}


def make_student(
    model: PreTrainedModel, shape: StudentShape | dict, batches: Iterable[dict[str, Tensor]] | None = None
) -> PreTrainedModel:
    """A smaller copy of a teacher, with its weights or, if `fresh`, random ones; the teacher stays as it is.

    Layers that stay are the teacher's, embeddings and head too. Where widths shrink, every layer keeps its most
    important groups: by weights alone (l2_tail) without batches; by what measures best for each kind on batches with
    `labels`; by what flows through (wanda; angular for layers) on batches without.

    Args:
        batches: Keyword arguments of forward passes, to tell importance from.
    Returns: a model that its config alone describes: what `save_pretrained` writes is an ordinary checkpoint.
    Raises: SlimError: before anything is computed, if the model has no such shape or its config cannot say it.
    """
    shape = StudentShape.of(shape)
    structure = structure_of(model, shape)
    cuts = plan_student(structure, shape)
    check_data(cuts, shape, batches is not None)
    if shape.fresh:
        return fresh_student(structure, cuts, shape).to(model.dtype).train(model.training)
    student = copy.deepcopy(model).requires_grad_(True)  # a teacher is frozen, and a student is there to learn
    become_student_(student, structure, cuts, shape, batches)
    return student


def become_student_(
    model: PreTrainedModel,
    structure: Structure,
    cuts: list[Cut],
    shape: StudentShape,
    batches: Iterable[dict[str, Tensor]] | None,
) -> Removed:
    """Makes a teacher the student. Returns what went: group set name -> indices.

    Args:
        structure: That of this model, or of the same model without weights.
    """
    removed = choose(cuts, shape, importance_of(model, _scored(cuts, shape), batches))
    cut_(model, structure, cuts, removed)
    if not is_plain(model):
        raise SlimConfigError(
            f"{type(model.config).__name__} cannot say which layers are left. Choose others, by `layers`."
        )
    return removed


def fresh_student(structure: Structure, cuts: list[Cut], shape: StudentShape) -> PreTrainedModel:
    """A model of the shape that the cuts leave, with random weights in float32, as `from_config` builds it."""
    smaller = module_copy(structure.twin)
    cut_(smaller, structure, cuts, choose(cuts, shape))
    return type(smaller)(smaller.config)


def student_skeleton(model: PreTrainedModel, shape: StudentShape) -> PreTrainedModel:
    """The student without weights, of a teacher that needs none: what it would look like."""
    structure = structure_of(model, shape)
    cuts = plan_student(structure, shape)
    if shape.choose == "importance":  # which layers stay does not change the shape
        shape = replace(shape, choose="first")
    smaller = module_copy(structure.twin)
    cut_(smaller, structure, cuts, choose(cuts, shape))
    return smaller


def check_data(cuts: list[Cut], shape: StudentShape, is_given: bool) -> None:
    """Raises SlimError if there is data and nothing that is chosen by it."""
    if is_given and (shape.fresh or not _scored(cuts, shape)):
        raise SlimConfigError(
            "Data was given, and nothing is chosen by it: widths are, and layers by `choose` importance, unless the "
            "student is `fresh`. Leave the data out."
        )


def _scored(cuts: list[Cut], shape: StudentShape) -> list[GroupSet]:
    """The group sets of which the most important groups stay."""
    losing = [cut for cut in cuts if cut.kept is None and cut.left < cut.group_set.count]
    return [cut.group_set for cut in losing if not cut.group_set.stack or shape.choose == "importance"]


def importance_of(
    model: PreTrainedModel, group_sets: list[GroupSet], batches: Iterable[dict[str, Tensor]] | None
) -> dict[str, Tensor]:
    """Scores of the groups, by criteria that suit what there is to look at; see `make_student`."""
    unstacked = [group_set for group_set in group_sets if group_set.kind == UNSTACKED or batches is None]
    scores = score_groups(model, unstacked, BY_WEIGHTS)
    others = [group_set for group_set in group_sets if group_set.name not in scores]
    if not others:
        return scores
    batches = list(batches)
    config = PruningConfig(criterion=None if all("labels" in batch for batch in batches) else WITHOUT_LOSS)
    with calibrating(model, batches) as run_batches:
        return scores | summed_scores(model, others, config, run_batches)
