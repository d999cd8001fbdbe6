"""One-shot pruning: removes the whole target after a few batches, and can repair the layers that read it."""

from collections.abc import Iterable

from torch import Tensor, nn

from hf_slim.core.errors import SlimDataError, SlimError
from hf_slim.core.lifecycle import convert
from hf_slim.core.record import record_of, state_of, unwrapped
from hf_slim.core.running.calibration import RunBatches, calibrating
from hf_slim.core.running.distributed import sum_over_ranks_
from hf_slim.pruning.budget.plan import Plan
from hf_slim.pruning.budget.selection import choose_removed
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.importance.criteria import CRITERIA
from hf_slim.pruning.importance.repair import repair_readers_
from hf_slim.pruning.importance.scores import not_finite, observed, score_all, sets_by_criterion
from hf_slim.pruning.importance.statistics import summed_over_ranks_
from hf_slim.pruning.state import PruningState
from hf_slim.pruning.transform import claim_for_pruning, mask_groups_


def prune(model: nn.Module, config: PruningConfig | dict, batches: Iterable[dict[str, Tensor]]) -> nn.Module:
    """Prunes a model in one shot, in place, without a Trainer: scores groups, removes the least important, repairs.

    Args:
        batches: Keyword arguments of forward passes; with `labels` if the criterion needs gradients.
    Returns: the smaller model, ready for `save_pretrained` or for training; the modes of its modules do not change.
    Raises: SlimError: if the config does not fit the model, or the batches do not fit the criterion. The model is then
        unchanged and can be pruned with another config; only weights that `repair` has changed are not restored.
    """
    config, batches = PruningConfig.of(config), list(batches)
    record, state = record_of(model), state_of(model, PruningState)
    configs, known_plan = dict(record.configs), state.plan
    plan = claim_for_pruning(model, config)
    try:
        with calibrating(model, batches) as run_batches:
            prune_at_once_(model, plan, config, run_batches)
    except BaseException:
        record.configs, state.plan = configs, known_plan  # masking is the last step, so nothing is masked yet
        raise
    return convert(model)


def prune_at_once_(model: nn.Module, plan: Plan, config: PruningConfig, run_batches: RunBatches) -> None:
    """Masks the whole target; with `config.repair`, corrects the layers that read the masked groups.

    Raises: SlimError: if there are no batches.
    """
    scores = summed_scores(model, plan.group_sets, config, run_batches)
    removed = choose_removed(plan, scores, state_of(model, PruningState).removed, config, progress=1.0)
    if config.repair:
        repair_readers_(model, plan.group_sets, removed, run_batches)
    mask_groups_(unwrapped(model), plan.group_sets, removed)


def summed_scores(
    model: nn.Module, group_sets: list[GroupSet], config: PruningConfig, run_batches: RunBatches
) -> dict[str, Tensor]:
    """The score of every group by the criterion of its kind, summed over the batches: name -> `(count,)`.

    Raises: SlimError: if there are no batches.
    """
    inner, total, batches = unwrapped(model), {}, 0
    by_criterion = sets_by_criterion(group_sets, config.criterion_by_kind)
    graded = [found for name, sets in by_criterion.items() if CRITERIA[name].needs_gradient for found in sets]
    others = [found for name, sets in by_criterion.items() if not CRITERIA[name].needs_gradient for found in sets]
    with observed(inner, others, config.criterion_by_kind) as seen:
        try:
            for _ in run_batches(bool(graded)):
                batches += 1
                for name, score in score_all(inner, graded, config.criterion_by_kind).items():
                    total[name] = total.get(name, 0) + score
                model.zero_grad(set_to_none=True)
        finally:
            model.zero_grad(set_to_none=True)
    if not batches:
        raise SlimError("One-shot pruning needs calibration batches, and there are none. Check the data.")
    for found in seen.values():
        summed_over_ranks_(found)
    sum_over_ranks_(total.values())  # every rank must make the same choice
    scores = total | score_all(inner, others, config.criterion_by_kind, seen)
    if (name := not_finite(scores)) is not None:
        raise SlimDataError(
            f"The scores of '{name}' are not finite on the calibration batches, so nothing can be ranked. Check the "
            "model and the data, or calibrate in bfloat16 or float32 instead of float16."
        )
    return scores
