"""Chooses which groups of a teacher are kept, and removes the others."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_slim.core.errors import is_own_mistake
from hf_slim.core.record import forget_state_, state_of
from hf_slim.integration.config_json import describe_converted, is_plain
from hf_slim.pruning.budget.selection import least_first
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.removal.cut import Removed, cut_out_
from hf_slim.pruning.state import PruningState
from hf_slim.pruning.structure.probe import module_copy
from hf_slim.pruning.transform import common_sizes
from hf_slim.student.shape import CHOICES, StudentShape
from hf_slim.student.structure import Structure


@dataclass(frozen=True)
class Cut:
    """How many groups of one group set are kept.

    Attributes:
        group_set: The groups.
        n_kept: Number of kept groups.
        kept: Indices of the kept groups; None: they are chosen by importance, or layers by `StudentShape.choose`.
    """

    group_set: GroupSet
    n_kept: int
    kept: list[int] | None = None


def choose_removed(cuts: list[Cut], shape: StudentShape, scores: dict[str, Tensor] | None = None) -> Removed:
    """Chooses the groups to remove: group set name -> sorted indices.

    Args:
        cuts: How many groups of each set are kept.
        shape: Determines how layers are chosen.
        scores: Group set name -> importance `(count,)`; without scores, the first removable groups are removed.
    """
    removed = {}
    for cut in cuts:
        group_set = cut.group_set
        score = (scores or {}).get(group_set.name, torch.zeros(group_set.count)).detach().cpu()
        if group_set.stack:
            kept = CHOICES[shape.choose](group_set, cut.n_kept, score) if cut.kept is None else cut.kept
            indices = [index for index in range(group_set.count) if index not in kept]
        else:
            indices = sorted(least_first(group_set, score, [])[: group_set.count - cut.n_kept].tolist())
        if indices:
            removed[group_set.name] = indices
    return removed


def cut_(model: nn.Module, structure: Structure, cuts: list[Cut], removed: Removed) -> None:
    """Removes groups from the model and writes the new sizes into its config.

    Args:
        model: The teacher, which becomes the student, or a copy of it.
        structure: Structure of the teacher.
        cuts: The group sets that change.
        removed: From `choose_removed`.
    """
    changed = [cut.group_set for cut in cuts]
    # unchanged ffn sets too: GPT-2's config states the number of neurons only if it is not 4 times the hidden width
    named = changed + [found for found in structure.of("ffn") if found not in changed]
    state = state_of(model, PruningState)
    state.sizes = common_sizes(model, named, removed)
    cut_out_(model, changed, removed)
    describe_converted(model)
    forget_state_(model, PruningState)


def accepts(structure: Structure, cuts: list[Cut], shape: StudentShape) -> bool:
    """Whether a plain config describes the student, tried on a copy without weights.

    Args:
        structure: Structure of the teacher.
        cuts: How many groups of each set are kept.
        shape: Determines how layers are chosen.
    """
    smaller = module_copy(structure.twin)
    try:
        cut_(smaller, structure, cuts, choose_removed(cuts, shape))
        return is_plain(smaller)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:  # raised by a config class
        if is_own_mistake(error):
            raise
        return False
