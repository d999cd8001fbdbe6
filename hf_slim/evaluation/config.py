"""How much is measured, and in what."""

from dataclasses import dataclass, field

import torch

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EvaluationConfig(SlimConfig):
    """How much to measure."""

    blocks: int = field(
        default=32, metadata={"help": "Held-out blocks of text, or batches of examples, that quality is measured on."}
    )
    batch_size: int = field(default=32, metadata={"help": "Examples in a batch, where a task measures in batches."})
    prefill_tokens: int = field(default=256, metadata={"help": "Length of the prompt that is timed."})
    decode_tokens: int = field(default=32, metadata={"help": "Tokens that are decoded after it, one at a time."})
    repeats: int = field(default=7, metadata={"help": "Timed rounds; medians need at least 5."})
    training_repeats: int = field(default=5, metadata={"help": "Timed training steps of each kind."})
    result_dtype: str = field(
        default="float32", metadata={"help": "What the compressed model computes in: float32 or bfloat16."}
    )
    prompt: str = field(
        default="def read_json(path):\n", metadata={"help": "Both models complete this, where they complete text."}
    )

    def __post_init__(self) -> None:
        for name in ("blocks", "batch_size", "prefill_tokens", "decode_tokens", "repeats", "training_repeats"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SlimError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if self.result_dtype not in DTYPES:
            raise SlimError(f"`result_dtype` must be float32 or bfloat16, got {self.result_dtype!r}.")

    def dtype_of(self, side: str) -> torch.dtype:
        """What the base (always float32) or the result is measured in."""
        return DTYPES[self.result_dtype] if side == "result" else torch.float32
