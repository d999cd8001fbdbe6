"""Gradual structured pruning as one line in a Trainer."""

import itertools
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_slim.core.adapters import adapter_layers
from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import claim, convert, is_prepared, record_of, unwrapped
from hf_slim.core.modules import evaluating
from hf_slim.pruning.budget.plan import Plan
from hf_slim.pruning.budget.selection import choose_removed
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.importance.scores import observed, score_all
from hf_slim.pruning.importance.statistics import summed_over_ranks_
from hf_slim.pruning.one_shot import prune_at_once_
from hf_slim.pruning.removal.cut import Removed
from hf_slim.pruning.removal.mask import zero_groups_
from hf_slim.pruning.transform import claim_for_pruning, mask_groups_

logger = logging.getLogger(__name__)
SCORE_MEMORY = 0.9  # weight of the past in the running mean of scores: about ten of them
SCORES_PER_RUN = 32  # not in every step of a long run: importance changes slowly,
STEPS_PER_SCORE = 8  # but a mean over ten scores must not be older than this times ten steps


class PruningCallback(TrainerCallback, ExportableState):
    """Zeroes more groups as training advances, and removes them when training ends.

    Args:
        config: A `PruningConfig`, or its fields as a dictionary.
    Attributes:
        removed: Group set name -> indices of the groups that are zero by now.
        scores: Group set name -> running mean of the importance of its groups.
        timings: What was measured for a target in time, on the device of the first process.
    """

    def __init__(self, config: PruningConfig | dict | None = None):
        self.config = PruningConfig.of(config or {})
        self.removed: Removed = {}
        self.scores: dict[str, Tensor] = {}
        self.timings: dict[str, Any] | None = None
        self.plan: Plan | None = None
        self._watching, self._seen, self._scores_now = ExitStack(), {}, False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if self.config.is_timed:  # measured once training begins, unless the run is resumed and its state has it
            claim(unwrapped(model), "pruning", self.config)
        else:
            self.plan = claim_for_pruning(unwrapped(model), self.config)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        train_dataloader: DataLoader | None = None, **kwargs,
    ) -> None:  # fmt: skip
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
        self.plan = claim_for_pruning(unwrapped(model), self.config, saved["attributes"].get("timings"))
        self.timings = self.plan.timings
        self.removed = saved["attributes"]["removed"]
        self.scores = {name: torch.tensor(score) for name, score in saved["attributes"]["scores"].items()}
        self._mask(model)
        self._watching.close()  # still open after a run that failed
        if self.config.calibration_batches and state.global_step == 0:
            self._prune_at_once(model, args, train_dataloader)
        elif not self._is_over(state):
            watching = observed(
                unwrapped(model),
                self.plan.group_sets,
                self.config.criterion,
                lambda layer: layer.training and self._scores_now,
            )
            self._seen = self._watching.enter_context(watching)

        def settle() -> None:  # whichever technique's callback converts the model when training ends
            self._settle(args, state, model)

        record_of(model).before_convert = [settle]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        interval = min(STEPS_PER_SCORE, round(self.config.stop * state.max_steps / SCORES_PER_RUN)) or 1
        self._scores_now = not self._is_over(state) and state.global_step % interval == 0
        if self._is_over(state):
            self._watching.close()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if not self._scores_now:
            return
        for seen in self._seen.values():
            summed_over_ranks_(seen)
        scores = score_all(unwrapped(model), self.plan.group_sets, self.config.criterion, self._seen)
        for seen in self._seen.values():
            seen.clear()
        for name, score in scores.items():
            past = self.scores.get(name)
            if past is not None:
                past = past.to(score.device)
                if self.config.regrow:  # what is zero now comes back with the importance that it had
                    gone = torch.tensor(self.removed.get(name, []), dtype=torch.long, device=score.device)
                    score[gone] = past[gone]
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
            if removed is not self.removed:
                self.removed = removed
                self._mask(model)
                return
        # momentum has just moved the zeros
        zero_groups_(unwrapped(model), self.plan.group_sets, self.removed, readers_only=self.config.regrow)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        optimizer: Optimizer | None = None, **kwargs,
    ) -> None:  # fmt: skip
        self._watching.close()
        if not is_prepared(model):  # another technique's callback may have finished the run already
            return
        if not is_prepared(model, "quantization"):
            convert(model, optimizer)
        elif not adapter_layers(unwrapped(model)):  # with adapters the quantization callback says how to merge them
            convert(model)

    def state(self) -> dict:
        return {
            "args": {"config": self.config.to_dict()},
            "attributes": {
                "removed": self.removed,
                "timings": self.timings,
                "scores": {name: torch.as_tensor(score).tolist() for name, score in self.scores.items()},
            },
        }

    def _settle(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Takes over the mask of the best checkpoint, where the Trainer has just loaded that one."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            saved = json.loads(Path(state.best_model_checkpoint, "trainer_state.json").read_text())
            self.removed = saved["stateful_callbacks"][type(self).__name__]["attributes"]["removed"]
        mask_groups_(unwrapped(model), self.plan.group_sets, self.removed)
        self._warn_if_short()

    def _is_over(self, state: TrainerState) -> bool:
        """Whether nothing is going to be removed any more."""
        return bool(self.config.calibration_batches) or state.global_step / state.max_steps >= self.config.stop

    def _prune_at_once(self, model: nn.Module, args: TrainingArguments, train_dataloader: DataLoader | None) -> None:
        batches = list(itertools.islice(train_dataloader or (), self.config.calibration_batches))
        with evaluating(model):
            prune_at_once_(
                model, self.plan, self.config, lambda with_gradient: run_batches(model, batches, args, with_gradient)
            )
        self.removed = record_of(model).removed

    def _mask(self, model: nn.Module) -> None:
        mask_groups_(unwrapped(model), self.plan.group_sets, self.removed, readers_only=self.config.regrow)

    def _warn_if_short(self) -> None:
        due = choose_removed(self.plan, self.scores, self.removed, self.config, 1.0) if self.scores else {}
        missing = sum(map(len, due.values())) - sum(map(len, self.removed.values()))
        if missing or not (self.scores or self.config.calibration_batches):
            logger.warning(
                "Pruning ended short of its target: %s groups fewer were removed than `sparsity` asks for, because "
                "training stopped early or an earlier checkpoint was best. Train to progress %s, or set "
                "`load_best_model_at_end=False`.",
                missing or "all", self.config.stop,
            )  # fmt: skip


def run_batches(model: nn.Module, batches: list[dict], args: TrainingArguments, with_gradient: bool) -> Iterator[None]:
    """Runs `batches` through the model in the precision of the run."""
    device = next(model.parameters()).device
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        inputs.pop("num_items_in_batch", None)
        with torch.set_grad_enabled(with_gradient), torch.autocast(device.type, dtype, enabled=dtype is not None):
            made = model(**inputs)
        if with_gradient:
            made["loss"].backward()
        yield
