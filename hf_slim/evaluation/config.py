"""Settings of the evaluation: how much is measured, and in which precision."""

from dataclasses import dataclass, field

import torch

from hf_slim.core.config import SlimConfig, require_whole
from hf_slim.core.errors import SlimConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EvaluationConfig(SlimConfig):
    """How much is measured when the result is compared with the base, and in which precision."""

    blocks: int = 32
    """Held-out blocks of text, or batches of examples for a classifier, on which quality is measured, a whole number
    of at least 1."""

    batch_size: int = 32
    """Examples in one batch, for tasks that are measured in batches, a whole number of at least 1."""

    prefill_tokens: int = 256
    """Length in tokens of the prompt whose processing (prefill) is timed, a whole number of at least 1."""

    decode_tokens: int = 32
    """Tokens that are generated after the prompt, one at a time, to time decoding, a whole number of at least 1."""

    repeats: int = 7
    """Timed rounds of every inference measure, a whole number of at least 1; a median needs 5 or more to be stable."""

    training_repeats: int = 5
    """Timed training steps of base and result each, a whole number of at least 1."""

    result_dtype: str = field(default="float32", metadata={"choices": DTYPES})
    """Precision in which the compressed model computes while it is measured: `float32` or `bfloat16`. The base is
    always measured in float32."""

    prompt: str = "def read_json(path):\n"
    """Text that both models complete in the report; used for language models only."""

    def __post_init__(self) -> None:
        for name in ("blocks", "batch_size", "prefill_tokens", "decode_tokens", "repeats", "training_repeats"):
            require_whole(name, getattr(self, name))
        if self.result_dtype not in DTYPES:
            raise SlimConfigError(f"`result_dtype` must be float32 or bfloat16, got {self.result_dtype!r}.")

    def dtype_of(self, side: str) -> torch.dtype:
        """The dtype that the base (always float32) or the result is measured in."""
        return DTYPES[self.result_dtype] if side == "result" else torch.float32
