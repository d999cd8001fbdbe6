"""The task causal-lm: blocks of running text; measures perplexity, prefill and decoding speed."""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, default_data_collator

from hf_slim.core.errors import SlimConfigError
from hf_slim.data import DataConfig, text_blocks
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.latency import inference_speed
from hf_slim.evaluation.quality import complete, perplexity_with_interval
from hf_slim.evaluation.tasks.task import TASKS, Measures, Side, Task


def _columns(data: DataConfig) -> list[str]:
    if len(data.text_columns) > 1:
        raise SlimConfigError(
            f"`data.text_column` names {data.text_columns}, and a causal language model reads one column. Name one."
        )
    return data.text_columns


def _measure(
    sides: dict[str, Side], examples: dict[str, Dataset], data: DataConfig, settings: EvaluationConfig
) -> dict[str, Measures]:
    models = {name: side.model for name, side in sides.items()}
    prompts = {
        name: torch.tensor([[t for block in blocks for t in block["input_ids"]][: settings.prefill_tokens]])
        for name, blocks in examples.items()
    }
    speed = inference_speed(models, prompts, settings.decode_tokens, settings.repeats)
    return {
        name: {
            "quality": _quality(side, examples[name], name),
            "inference": speed[name],
            "prompt_and_completion": settings.prompt + complete(side.model, side.tokenizer, settings.prompt),
        }
        for name, side in sides.items()
    }


def _quality(side: Side, blocks: Dataset, name: str) -> Measures:
    value, interval = perplexity_with_interval(side.model, blocks, f"perplexity of {name}")
    return {"perplexity": value, "perplexity_interval": interval, "blocks": len(blocks)}


def _memory_input(data: DataConfig, settings: EvaluationConfig) -> dict[str, torch.Tensor | int]:
    return {"input_ids": torch.ones(1, settings.prefill_tokens, dtype=torch.long), "logits_to_keep": 1}


TASKS.register("causal-lm")(
    Task(
        auto_class=AutoModelForCausalLM,
        loss_counts_items=True,
        columns=_columns,
        label_names=lambda train, data: None,
        configure_=lambda model, tokenizer: None,
        examples=lambda texts, tokenizer, label2id, data, count, seed: text_blocks(
            texts, tokenizer, data, count, seed, "reading text"
        ),
        collator=lambda tokenizer: default_data_collator,
        held_out=lambda settings: settings.blocks,
        measure=_measure,
        memory_input=_memory_input,
    )
)
