"""A base model and its compressed form, measured side by side."""

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.evaluation.footprint import multiply_adds_per_token, parameter_count, ram_bytes
from hf_slim.evaluation.latency import inference_speed
from hf_slim.evaluation.quality import complete, perplexity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EvaluationConfig(SlimConfig):
    """How much to measure."""

    blocks: int = field(default=32, metadata={"help": "Held-out blocks that perplexity is measured on."})
    prefill_tokens: int = field(default=256, metadata={"help": "Length of the prompt that is timed."})
    decode_tokens: int = field(default=32, metadata={"help": "Tokens that are decoded after it, one at a time."})
    repeats: int = field(default=7, metadata={"help": "Timed rounds; medians need at least 5."})
    training_repeats: int = field(default=5, metadata={"help": "Timed training steps of each kind."})
    result_dtype: str = field(
        default="float32", metadata={"help": "What the compressed model computes in: float32 or bfloat16."}
    )
    prompt: str = field(default="def read_json(path):\n", metadata={"help": "Both models complete this."})

    def __post_init__(self) -> None:
        for name in ("blocks", "prefill_tokens", "decode_tokens", "repeats", "training_repeats"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SlimError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if self.result_dtype not in DTYPES:
            raise SlimError(f"`result_dtype` must be float32 or bfloat16, got {self.result_dtype!r}.")

    def dtype_of(self, side: str) -> torch.dtype:
        """What the base (always float32) or the result is measured in."""
        return DTYPES[self.result_dtype] if side == "result" else torch.float32


def measure_models(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, blocks: Dataset, settings: EvaluationConfig
) -> dict[str, dict[str, Any]]:
    """Quality, memory, compute and inference speed of each model: name -> measures.

    Args:
        models: Name -> model; timings are taken in turn.
        blocks: Held-out `input_ids`, the same for every model; the first ones serve as the timed prompt.
    """
    ids = [token for example in blocks for token in example["input_ids"]][: settings.prefill_tokens]
    speed = inference_speed(models, torch.tensor([ids]), settings.decode_tokens, settings.repeats)
    return {
        name: {
            "quality": {"perplexity": perplexity(model, blocks, f"perplexity of {name}"), "blocks": len(blocks)},
            "dtype": str(model.dtype).removeprefix("torch."),
            "memory": {"ram_bytes": ram_bytes(model)},
            "compute": {
                "parameters": parameter_count(model),
                "multiply_adds_per_token": multiply_adds_per_token(model),
            },
            "inference": speed[name],
            "prompt_and_completion": settings.prompt + complete(model, tokenizer, settings.prompt),
        }
        for name, model in models.items()
    }
