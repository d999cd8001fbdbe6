"""Which groups of a teacher stay, and the teacher without the others."""

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
    """What one group set keeps: `left` groups, or exactly those of `kept`."""

    group_set: GroupSet
    left: int
    kept: list[int] | None = None


def choose(cuts: list[Cut], shape: StudentShape, scores: dict[str, Tensor] | None = None) -> Removed:
    """The groups that go: group set name -> sorted indices; without scores, the first that may."""
    removed = {}
    for cut in cuts:
        group_set = cut.group_set
        score = (scores or {}).get(group_set.name, torch.zeros(group_set.count)).detach().cpu()
        if group_set.stack:
            kept = CHOICES[shape.choose](group_set, cut.left, score) if cut.kept is None else cut.kept
            gone = [index for index in range(group_set.count) if index not in kept]
        else:
            gone = sorted(least_first(group_set, score, [])[: group_set.count - cut.left].tolist())
        if gone:
            removed[group_set.name] = gone
    return removed


def cut_(model: nn.Module, structure: Structure, cuts: list[Cut], removed: Removed) -> None:
    """Cuts what is removed out of the model and writes what is left into its config."""
    changed = [cut.group_set for cut in cuts]
    # neurons that stay count too: GPT-2's config only says how many there are once it has to
    named = changed + [found for found in structure.of("ffn") if found not in changed]
    state = state_of(model, PruningState)
    state.sizes = common_sizes(model, named, removed)
    cut_out_(model, changed, removed)
    describe_converted(model)
    forget_state_(model, PruningState)


def accepts(structure: Structure, cuts: list[Cut], shape: StudentShape) -> bool:
    """Whether a plain config describes what the cuts leave, tried on a twin without weights."""
    smaller = module_copy(structure.twin)
    try:
        cut_(smaller, structure, cuts, choose(cuts, shape))
        return is_plain(smaller)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:  # of a config class
        if is_own_mistake(error):
            raise
        return False
