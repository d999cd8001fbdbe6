"""Gradual structured pruning as one line in a Trainer."""

import json
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import begin_run, claim, finish_run
from hf_slim.core.record import is_prepared, state_of, unwrapped
from hf_slim.core.running.calibration import calibrating, first_batches, precision_of_run
from hf_slim.core.running.cards import keep_card_
from hf_slim.core.running.logs import add_to_logs
from hf_slim.progress import progress
from hf_slim.pruning.budget.selection import choose_removed
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.importance.scores import averaged, not_finite, observed, score_all
from hf_slim.pruning.importance.statistics import summed_over_ranks_
from hf_slim.pruning.one_shot import prune_at_once_
from hf_slim.pruning.removal.mask import zero_groups_
from hf_slim.pruning.state import PruningState
from hf_slim.pruning.transform import claim_for_pruning, mask_groups_

logger = logging.getLogger(__name__)
SCORES_PER_RUN = 32  # importance changes slowly, so a long run does not compute it in every step,
STEPS_PER_SCORE = 8  # but at least once in this many steps


class PruningCallback(TrainerCallback, ExportableState):
    """Zeroes more and more groups during training, and removes them when training ends.

    Logs `sparsity` (share of the groups that are zero) and `groups_removed`.

    Args:
        config: A `PruningConfig`, or its fields as a dictionary.

    Attributes:
        run: The state of the run: plan, removed groups, scores and timings.
    """

    def __init__(self, config: PruningConfig | dict | None = None):
        self.config = PruningConfig.of(config or {})
        self.run = PruningState()
        self._observing, self._seen, self._scores_now = ExitStack(), {}, False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Finds the prunable groups and plans the removal. Raises SlimError if the config does not fit the model."""
        if self.config.is_timed:  # times are measured when training begins, or read from the state of a resumed run
            claim(unwrapped(model), "pruning", self.config)
        else:
            claim_for_pruning(unwrapped(model), self.config)
        self.run = state_of(model, PruningState)
        self.run.removed, self.run.scores = {}, {}  # deletes the state of an earlier Trainer with this model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        train_dataloader: DataLoader | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Restores the state of a resumed run, masks its groups, and starts to observe activations."""
        if not is_prepared(model, "pruning"):
            raise SlimError(
                "The model is not prepared for pruning: either it was converted at the end of an earlier run, or the "
                "callback was added after the Trainer was built. Load the model again and pass the callback in "
                "`Trainer(callbacks=[...])`."
            )
        # setdefault: a checkpoint written without this callback has no entry, and Trainer's next save needs one.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):
            raise SlimError(
                "Two PruningCallbacks in one Trainer overwrite each other's state. Use one with the settings of both."
            )
        begin_run(model, "pruning", state)
        claim_for_pruning(unwrapped(model), self.config, saved["attributes"].get("timings"))
        self.run = state_of(model, PruningState)
        self.run.restore(saved["attributes"])
        self._mask(model)
        self._observing.close()  # still open after a run that failed
        if self.config.calibration_batches and state.global_step == 0:
            self._prune_at_once(model, args, train_dataloader)
        elif not self._is_over(state):
            observing = observed(
                unwrapped(model), self.run.plan.group_sets, self.config.criterion_by_kind, self._is_observed
            )
            self._seen = self._observing.enter_context(observing)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decides whether importance is measured in this step."""
        interval = min(STEPS_PER_SCORE, round(self.config.stop * state.max_steps / SCORES_PER_RUN)) or 1
        self._scores_now = not self._is_over(state) and state.global_step % interval == 0
        if self._is_over(state):
            self._observing.close()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Scores the groups while gradients exist, and adds the scores to the running mean."""
        if not self._scores_now:
            return
        for seen in self._seen.values():
            summed_over_ranks_(seen)
        scores = score_all(unwrapped(model), self.run.plan.group_sets, self.config.criterion_by_kind, self._seen)
        for seen in self._seen.values():
            seen.clear()
        if (name := not_finite(scores)) is not None:
            logger.warning(
                "Step %d: the scores of '%s' are not finite, so pruning uses none of this step's scores. "
                "This is usual where fp16 overflows and the step is skipped; otherwise check the loss.",
                state.global_step + 1, name,
            )  # fmt: skip
            return
        masked = self.run.removed if self.config.regrow else {}  # masked groups keep their last score
        self.run.scores |= averaged(self.run.scores, scores, masked)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Masks more groups by the schedule, and zeroes the masked ones again, because momentum has changed them."""
        step = state.global_step + 1
        progress = step / state.max_steps
        due = step % self.config.every == 0 or progress >= self.config.stop
        if self.run.scores and due:
            removed = choose_removed(self.run.plan, self.run.scores, self.run.removed, self.config, progress)
            if removed is not self.run.removed:
                self.run.removed = removed
                self._mask(model)
                return
        zero_groups_(unwrapped(model), self.run.plan.group_sets, self.run.removed, readers_only=self.config.regrow)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Adds `sparsity` and `groups_removed` to the log."""
        if "loss" in logs and self.run.plan is not None:
            shown = {"sparsity": round(self.run.sparsity(), 4), "groups_removed": self.run.groups_removed}
            add_to_logs(state, logs, shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        optimizer: Optimizer | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Restores the mask of the best checkpoint, and converts the model after all techniques have finished."""
        self._observing.close()
        if is_prepared(model, "pruning"):
            self._set_final_mask(args, state, model)
        finish_run(model, "pruning", optimizer)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has the model's card and report uploaded instead of the Trainer's draft of a card."""
        keep_card_(self)

    def state(self) -> dict[str, Any]:
        """The state that the Trainer writes into `trainer_state.json`."""
        return {"args": {"config": self.config.to_dict()}, "attributes": self.run.to_json()}

    def _set_final_mask(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Sets the mask of the best checkpoint if the Trainer has loaded it, otherwise the current mask."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            saved = json.loads(Path(state.best_model_checkpoint, "trainer_state.json").read_text())
            self.run.removed = saved["stateful_callbacks"][type(self).__name__]["attributes"]["removed"]
        mask_groups_(unwrapped(model), self.run.plan.group_sets, self.run.removed)
        self._warn_if_short()

    def _is_over(self, state: TrainerState) -> bool:
        """Whether no more groups will be masked."""
        return bool(self.config.calibration_batches) or state.global_step / state.max_steps >= self.config.stop

    def _is_observed(self, layer: nn.Module) -> bool:
        return layer.training and self._scores_now

    def _prune_at_once(self, model: nn.Module, args: TrainingArguments, train_dataloader: DataLoader | None) -> None:
        batches = first_batches(train_dataloader, self.config.calibration_batches)

        def shown(batches: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
            return progress(batches, "calibrating", "batch", shown=not args.disable_tqdm)

        with calibrating(model, batches, precision_of_run(args.bf16, args.fp16), shown) as run_batches:
            prune_at_once_(model, self.run.plan, self.config, run_batches)

    def _mask(self, model: nn.Module) -> None:
        mask_groups_(unwrapped(model), self.run.plan.group_sets, self.run.removed, readers_only=self.config.regrow)

    def _warn_if_short(self) -> None:
        if self.config.calibration_batches:
            return  # all was removed before the first step
        run = self.run
        due = choose_removed(run.plan, run.scores, run.removed, self.config, 1.0) if run.scores else {}
        missing = sum(map(len, due.values())) - run.groups_removed
        if missing or not run.scores:
            logger.warning(
                "Pruning ended short of its target: %s of the planned groups were not removed, because training "
                "stopped early or an earlier checkpoint was best. Train to progress %s, or set "
                "`load_best_model_at_end=False`.",
                missing or "all", self.config.stop,
            )  # fmt: skip
