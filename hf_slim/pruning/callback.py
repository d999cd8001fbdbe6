"""Gradual structured pruning as one line in a Trainer."""

import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import convert, is_prepared, record_of
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.importance import score_groups
from hf_slim.pruning.mask import zero_groups_
from hf_slim.pruning.removal import Removed
from hf_slim.pruning.selection import Plan, choose_removed
from hf_slim.pruning.transform import claim_for_pruning, mask_groups_

logger = logging.getLogger(__name__)
SCORE_MEMORY = 0.9  # weight of the past in the running mean of scores; about ten steps


class PruningCallback(TrainerCallback, ExportableState):
    """Zeroes more groups as training advances, and removes them when training ends.

    Args:
        config: A `PruningConfig`, or its fields as a dictionary.
    Attributes:
        removed: Group set name -> indices of the groups that are zero by now.
        scores: Group set name -> running mean of the importance of its groups.
    """

    def __init__(self, config: PruningConfig | dict | None = None):
        self.config = PruningConfig.of(config or {})
        self.removed: Removed = {}
        self.scores: dict[str, Tensor] = {}
        self.plan: Plan | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self.plan = claim_for_pruning(model, self.config)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if not is_prepared(model, "pruning"):
            raise SlimError(
                "The model is not prepared for pruning: either it was converted at the end of an earlier run, or the "
                "callback was added after the Trainer was built. Load the model afresh and pass the callback in "
                "`Trainer(callbacks=[...])`."
            )
        # setdefault: a checkpoint written without this callback has no entry, and Trainer's next save needs one.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):
            raise SlimError(
                "Two PruningCallbacks in one Trainer restore each other's state. Use one, with both kinds."
            )
        self.plan = claim_for_pruning(model, self.config)
        self.removed = saved["attributes"]["removed"]
        self.scores = {name: torch.tensor(score) for name, score in saved["attributes"]["scores"].items()}
        self._mask(model)

        def settle() -> None:  # whichever technique's callback converts the model when training ends
            self._settle(args, state, model)

        record_of(model).before_convert = [settle]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if (state.global_step / state.max_steps) >= self.config.stop:
            return
        for name, score in score_groups(model, self.plan.group_sets, self.config.criterion).items():
            past = self.scores.get(name)
            if past is not None:
                past = past.to(score.device)
                score[self.removed.get(name, [])] = past[self.removed.get(name, [])]  # what was zeroed has no say
                score = past.lerp(score, 1 - SCORE_MEMORY)
            self.scores[name] = score

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        step = state.global_step + 1
        progress = step / state.max_steps
        due = step % self.config.every == 0 or progress >= self.config.stop
        if self.scores and due:
            removed = choose_removed(self.plan, self.scores, self.removed, self.config, progress)
            if removed != self.removed:
                self.removed = removed
                self._mask(model)
                return
        # momentum has just moved the zeros
        zero_groups_(model, self.plan.group_sets, self.removed, readers_only=self.config.regrow)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if is_prepared(model):  # another technique's callback may have finished the run already
            convert(model)

    def state(self) -> dict:
        return {
            "args": {"config": self.config.to_dict()},
            "attributes": {
                "removed": self.removed,
                "scores": {name: torch.as_tensor(score).tolist() for name, score in self.scores.items()},
            },
        }

    def _settle(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Takes over the mask of the best checkpoint, where the Trainer has just loaded that one."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            saved = json.loads(Path(state.best_model_checkpoint, "trainer_state.json").read_text())
            self.removed = saved["stateful_callbacks"][type(self).__name__]["attributes"]["removed"]
        mask_groups_(model, self.plan.group_sets, self.removed)
        self._warn_if_short()

    def _mask(self, model: nn.Module) -> None:
        mask_groups_(model, self.plan.group_sets, self.removed, readers_only=self.config.regrow)

    def _warn_if_short(self) -> None:
        due = choose_removed(self.plan, self.scores, self.removed, self.config, 1.0) if self.scores else {}
        missing = sum(map(len, due.values())) - sum(map(len, self.removed.values()))
        if missing or not self.scores:
            logger.warning(
                "Pruning ended short of its target: %s groups fewer were removed than `sparsity` asks for, because "
                "training stopped early or an earlier checkpoint was best. Train to progress %s, or set "
                "`load_best_model_at_end=False`.",
                missing or "all", self.config.stop,
            )  # fmt: skip
