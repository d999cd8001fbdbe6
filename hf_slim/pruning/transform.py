"""Pruning as prepare and convert: mask now, remove later."""

from torch import nn

from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import Technique, claim, record_of, register_technique
from hf_slim.pruning.architectures import find_group_sets
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.importance import CRITERIA, score_groups
from hf_slim.pruning.mask import Removed, choose_removed, final_counts, mark_kept_columns_, zero_groups_
from hf_slim.pruning.removal import remove_groups_


def groups_to_prune(model: nn.Module, config: PruningConfig) -> list[GroupSet]:
    """What `config` can prune in this model; changes nothing.

    Returns: the group sets of the kinds that lose groups.
    Raises: SlimError: if the model has no matching structure or its weights are packed.
    """
    kinds = {kind for kind, share in config.sparsity.items() if share}
    group_sets = [group_set for group_set in find_group_sets(model) if group_set.kind in kinds]
    for group_set in group_sets:
        for part in group_set.slices:
            if not model.get_submodule(part.module).weight.is_floating_point():
                raise SlimError(
                    f"'{part.module}' holds packed integers, which cannot be pruned. Prune before quantizing."
                )
    final_counts(group_sets, config)
    return group_sets


def claim_for_pruning(model: nn.Module, config: PruningConfig) -> list[GroupSet]:
    """`groups_to_prune`, and a note that the model is going to be pruned; masks nothing."""
    group_sets = groups_to_prune(model, config)
    claim(model, "pruning", config)
    return group_sets


def mask_groups_(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> None:
    """Makes `removed` the model's mask: zeroes the groups and notes them for `convert`."""
    record_of(model).removed = removed
    zero_groups_(model, group_sets, removed)
    mark_kept_columns_(model, group_sets, removed)


def check_pruning(model: nn.Module, config: PruningConfig) -> None:
    """Raises SlimError if `prepare_pruning` cannot work: no such structure, or no gradients where they are needed."""
    groups_to_prune(model, config)
    if CRITERIA[config.criterion].needs_gradient and all(p.grad is None for p in model.parameters()):
        raise SlimError(
            f"Criterion '{config.criterion}' needs gradients and this model holds none. Call `loss.backward()` on "
            "some batches before `prepare`, choose criterion 'l1' or 'l2', or use PruningCallback in a Trainer."
        )


def prepare_pruning(model: nn.Module, config: PruningConfig) -> None:
    """Masks the whole target in one shot: for training loops without a Trainer."""
    group_sets = claim_for_pruning(model, config)
    scores = score_groups(model, group_sets, config.criterion)
    removed = choose_removed(group_sets, scores, record_of(model).removed, config, progress=1.0)
    mask_groups_(model, group_sets, removed)


def convert_pruning(model: nn.Module) -> None:
    """Removes what is masked."""
    record = record_of(model)
    remove_groups_(model, find_group_sets(model), record.removed)
    record.removed = {}


register_technique(Technique("pruning", 10, PruningConfig, check_pruning, prepare_pruning, convert_pruning))
