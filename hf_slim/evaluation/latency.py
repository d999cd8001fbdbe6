"""Inference speed of several models; every repetition runs all of them in turn, so that noise affects all equally."""

import statistics

import torch
from transformers import PreTrainedModel

from hf_slim.integration.kv_cache import cache_argument, cache_of
from hf_slim.timing import interleaved_ms


def spread(samples: list[float]) -> dict[str, float | list[float]]:
    """Median, smallest and largest of the samples, and the samples themselves."""
    return {
        "median": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "samples": [round(sample, 3) for sample in samples],
    }


def inference_speed(
    models: dict[str, PreTrainedModel], prompts: dict[str, torch.Tensor], decode_tokens: int, repeats: int
) -> dict[str, dict[str, dict]]:
    """Prefill and greedy decoding of each model at batch size 1.

    Args:
        models: Name -> model in evaluation mode.
        prompts: Token ids `(1, n_tokens)` for each of them.
        decode_tokens: Tokens to decode after the prompt, one at a time with a cache.
    Returns: name -> `{"prefill_ms": spread, "decode_tokens_per_s": spread}`.
    """
    caches: dict[str, object] = {}
    arguments = {name: cache_argument(model) for name, model in models.items()}

    def prefill(name: str) -> None:
        model = models[name]
        with torch.inference_mode():
            output = model(input_ids=prompts[name].to(model.device), use_cache=True, logits_to_keep=1)
        caches[name] = cache_of(output), output.logits[:, -1:].argmax(-1)

    def decode(name: str) -> None:
        cache, token = caches[name]
        with torch.inference_mode():
            for _ in range(decode_tokens):
                output = models[name](input_ids=token, use_cache=True, **{arguments[name]: cache})
                cache, token = cache_of(output), output.logits[:, -1:].argmax(-1)
        cache.crop(-decode_tokens)  # the next round starts from the prompt again

    prefills = interleaved_ms({name: lambda name=name: prefill(name) for name in models}, repeats, "prefill")
    decodes = interleaved_ms({name: lambda name=name: decode(name) for name in models}, repeats, "decode")
    return {
        name: {
            "prefill_ms": spread(prefills[name]),
            "decode_tokens_per_s": spread([1000 * decode_tokens / sample for sample in decodes[name]]),
        }
        for name in models
    }


def batch_speed(models: dict[str, PreTrainedModel], batches: dict[str, torch.Tensor], repeats: int) -> dict[str, dict]:
    """Samples per second of each model's forward pass over its batch of token ids: name -> spread."""

    def forward(name: str) -> None:
        with torch.inference_mode():
            models[name](input_ids=batches[name].to(models[name].device))

    samples = interleaved_ms({name: lambda name=name: forward(name) for name in models}, repeats, "throughput")
    return {name: spread([1000 * len(batches[name]) / ms for ms in values]) for name, values in samples.items()}
