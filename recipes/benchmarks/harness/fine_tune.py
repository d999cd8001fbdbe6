"""The fine-tune that quality benchmarks of a language model give to every side, and the judgement after it."""

import argparse
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from harness.inputs import Inputs
from hf_slim.data import load_texts, text_blocks
from hf_slim.evaluation.quality import perplexity
from hf_slim.integration.loading import load_model, load_tokenizer

SEED = 42


class FineTune:
    """One model, one set of blocks, one schedule.

    Args:
        steps: Optimizer steps of one block each.
        held_out_blocks: Blocks that the result is judged on.
        train_blocks: Training blocks to read, where a benchmark needs more than it trains on.
    """

    def __init__(self, inputs: Inputs, steps: int, held_out_blocks: int, learning_rate: float, train_blocks: int = 0):
        tokenizer, (train, held_out) = load_tokenizer(inputs.causal), load_texts(inputs.texts)
        self.model_name, self.steps, self.learning_rate = inputs.causal, steps, learning_rate
        wanted = max(steps, train_blocks)
        self.train_blocks = text_blocks(train, tokenizer, inputs.texts, wanted, SEED, "reading training text")
        self.held_out = text_blocks(held_out, tokenizer, inputs.texts, held_out_blocks, 0, "reading held-out text")

    def model(self) -> PreTrainedModel:
        """The untouched model, loaded again."""
        return load_model(self.model_name)

    def trained(self, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> PreTrainedModel:
        """`model` after the same fine-tune as every other."""
        with tempfile.TemporaryDirectory() as scratch:
            args = TrainingArguments(
                scratch, max_steps=self.steps, per_device_train_batch_size=1, learning_rate=self.learning_rate,
                lr_scheduler_type="cosine", warmup_steps=min(5, self.steps), bf16=True, seed=SEED, save_strategy="no",
                disable_tqdm=False, report_to="none", use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            blocks = self.train_blocks.select(range(self.steps))
            Trainer(
                model, args, train_dataset=blocks, data_collator=default_data_collator, callbacks=callbacks
            ).train()
        return model

    def perplexity(self, model: nn.Module) -> float:
        """On the held-out blocks; in float32, or in the bf16 autocast that a Trainer leaves on what it trained."""
        return perplexity(model, self.held_out)

    def calibration(self, n_blocks: int) -> torch.Tensor:
        """Token ids `(n_blocks, block size)`, the first of those that the fine-tune trains on."""
        return torch.tensor(self.train_blocks.select(range(n_blocks))["input_ids"])


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--steps`, `--blocks` and `--learning-rate`."""
    parser.add_argument("--steps", type=int, default=100, help="training steps of 512 tokens (default: 100)")
    parser.add_argument("--blocks", type=int, default=16, help="held-out blocks of 512 tokens (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_options` added, for the results."""
    return {key: vars(options)[key] for key in ("steps", "blocks", "learning_rate")}
