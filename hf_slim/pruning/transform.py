"""Pruning as prepare (masks groups) and convert (removes them)."""

import logging
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_value
from hf_slim.core.lifecycle import Technique, claim
from hf_slim.core.record import record_of, state_of
from hf_slim.pruning.budget.latency import measure_latency
from hf_slim.pruning.budget.plan import Plan, candidates, plan_removal
from hf_slim.pruning.budget.selection import choose_removed
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.importance.criteria import CRITERIA
from hf_slim.pruning.importance.scores import score_all, sets_by_criterion
from hf_slim.pruning.removal.cut import Removed, remove_groups_
from hf_slim.pruning.removal.mask import mark_kept_columns_, zero_groups_
from hf_slim.pruning.removal.masked_norms import mask_norms_
from hf_slim.pruning.state import PruningState
from hf_slim.pruning.structure.find import understand

logger = logging.getLogger(__name__)


def plan_pruning(model: nn.Module, config: PruningConfig, timings: dict[str, Any] | None = None) -> Plan:
    """The plan of `config` for this model. Does not change the model.

    Args:
        timings: Times that were measured before, for a latency target; None: they are measured now.
    Raises: SlimError: if the model has no matching structure or its weights are packed.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise SlimError(f"'{name}' has packed integer values, which cannot be pruned. Prune before quantizing.")
    found, refusals = understand(model, kinds={*config.kinds, *(["kv_heads"] if "heads" in config.kinds else [])})
    missing = [kind for kind in config.kinds if not any(group_set.kind == kind for group_set in found)]
    if missing == ["heads"]:  # multi-head attention: every key-value head has one query head
        found, missing = [_as_heads(group_set) for group_set in found], []
    refused = [refusal.reason for refusal in refusals if refusal.kind in config.kinds]
    if missing and refused and config.target is None:
        raise SlimError(f"No {' or '.join(missing)} can be pruned in this model. {'; '.join(refused[:3])}.")
    if refused:
        logger.warning("%d layers are not pruned: %s.", len(refused), "; ".join(refused[:3]))
    if config.is_timed and timings is None:
        timings = measure_latency(model, candidates(found, config), config)
    return plan_removal(model, found, config, timings)


def claim_for_pruning(model: nn.Module, config: PruningConfig, timings: dict[str, Any] | None = None) -> Plan:
    """The plan of `plan_pruning`, recorded on the model for `config`; masks nothing."""
    state, claimed = state_of(model, PruningState), record_of(model).configs.get("pruning")
    plan = state.plan if claimed == config and state.plan is not None else plan_pruning(model, config, timings)
    claim(model, "pruning", config)
    state.plan = plan
    return plan


def mask_groups_(model: nn.Module, group_sets: list[GroupSet], removed: Removed, readers_only: bool = False) -> None:
    """Makes `removed` the model's mask: zeroes these groups, and records them for `convert`."""
    state_of(model, PruningState).removed = removed
    zero_groups_(model, group_sets, removed, readers_only)
    mark_kept_columns_(model, group_sets, removed)
    mask_norms_(model, group_sets, removed)


def check_pruning(model: nn.Module, config: PruningConfig) -> Plan:
    """The plan. Raises SlimError if the model cannot be pruned in this way, or if needed gradients are missing."""
    plan = plan_pruning(model, config)
    graded = [
        name for name in sets_by_criterion(plan.group_sets, config.criterion_by_kind) if CRITERIA[name].needs_gradient
    ]
    if graded and all(parameter.grad is None for parameter in model.parameters()):
        raise SlimError(
            f"Criterion '{graded[0]}' needs gradients and this model has none. Call `loss.backward()` on "
            "some batches before `prepare`, choose criterion 'l1_tail', or use PruningCallback in a Trainer."
        )
    return plan


def prepare_pruning(model: nn.Module, config: PruningConfig, plan: Plan) -> None:
    """Masks the whole target of a plan in one shot, for training loops without a Trainer."""
    claim(model, "pruning", config)
    state = state_of(model, PruningState)
    state.plan, state.scores = plan, score_all(model, plan.group_sets, config.criterion_by_kind)
    removed = choose_removed(plan, state.scores, state.removed, config, progress=1.0)
    mask_groups_(model, plan.group_sets, removed)


def convert_pruning(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Removes the masked groups, also from the state of an optimizer."""
    state = state_of(model, PruningState)
    state.sizes = common_sizes(model, state.plan.group_sets, state.removed)
    mask_norms_(model, state.plan.group_sets, {})
    remove_groups_(model, state.plan.group_sets, state.removed, optimizer)


def common_sizes(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> dict[str, int]:
    """Config fields with the new sizes; fields for which layers have different sizes are omitted."""
    values: dict[str, set[int]] = {}
    for group_set in group_sets:
        left = group_set.count - len(removed.get(group_set.name, ()))
        for name in group_set.config_fields:
            now = config_value(model, name)
            values.setdefault(name, set()).add(left if now is None else now * left // group_set.count)
    return {name: found.pop() for name, found in values.items() if len(found) == 1}


def _as_heads(group_set: GroupSet) -> GroupSet:
    return replace(group_set, kind="heads") if group_set.kind == "kv_heads" else group_set


PRUNING = Technique(
    "pruning", 10, PruningConfig, check_pruning, prepare_pruning, convert_pruning, trains_on=True,
    state_class=PruningState,
)  # fmt: skip
