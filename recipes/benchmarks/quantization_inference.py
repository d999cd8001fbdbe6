"""Inference of packed models, batch 1, against the float32 model: SmolLM2-135M, all sides in one process.

python recipes/benchmarks/quantization_inference.py              # four minutes on 2 cores
python recipes/benchmarks/quantization_inference.py --compile    # decoding under torch.compile as well; needs g++
"""

import copy
import tempfile
from collections.abc import Callable

import torch
from harness.command import Run, parser_of, run_script
from harness.results import Results, Values
from transformers import PreTrainedModel, StaticCache

from hf_slim import QuantizationConfig, convert, prepare
from hf_slim.evaluation.footprint import disk_bytes
from hf_slim.evaluation.latency import inference_speed, interleaved_ms, spread
from hf_slim.integration.kv_cache import cache_argument
from hf_slim.integration.loading import load_model

# name: (config, dtype it runs in)
SIDES = {
    "fp32": (None, torch.float32),
    "bf16": (None, torch.bfloat16),
    "w8a8": (QuantizationConfig("w8a8", embeddings="w8a8"), torch.float32),
    "w4a8 (channels)": (QuantizationConfig("w4a8", embeddings="w8a8"), torch.float32),
    "w8a16, bf16": (QuantizationConfig("w8a16", embeddings="w8a16"), torch.bfloat16),
    "w4a16-g64, bf16": (QuantizationConfig("w4a16-g64", embeddings="w8a16"), torch.bfloat16),
    "nf4, bf16": (QuantizationConfig("nf4", embeddings="w8a16"), torch.bfloat16),
}
COMPILED = ("fp32", "w8a8", "w8a16, bf16", "w4a16-g64, bf16")
PROMPT_TOKENS, DECODE_TOKENS = 256, 32


def packed(
    base: PreTrainedModel, config: QuantizationConfig | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, int]:
    """The model as `from_pretrained` gives it back, and its bytes on disk."""
    model = copy.deepcopy(base)
    if config is not None:
        convert(prepare(model, config))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_model(folder, dtype), disk_bytes(folder)


def compiled_decoder(
    model: PreTrainedModel, prompt: torch.Tensor, n_tokens: int, compiled: bool
) -> Callable[[], None]:
    """Greedy decoding with a static cache, `n_tokens` a call, each call from the same prompt."""
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    length = prompt.shape[1] + n_tokens + 1
    cache = StaticCache(config=model.config, max_cache_len=length)
    cached = {cache_argument(model): cache}

    @torch.inference_mode()
    def decode() -> None:
        cache.reset()
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **cached)
        token = output.logits[:, -1:].argmax(-1)
        for place in range(prompt.shape[1], prompt.shape[1] + n_tokens):
            position = torch.tensor([[place]])
            output = forward(input_ids=token, position_ids=position, use_cache=True, **cached)
            token = output.logits[:, -1:].argmax(-1)

    return decode


def fill(results: Results, base: PreTrainedModel, repeats: int, with_compile: bool) -> None:
    """The rows "fp32", "w8a8", ..., and "w8a8, static cache", "w8a8, compiled", ..."""
    compiled_rows = [row_of(name, compiled) for name in COMPILED for compiled in (False, True)] if with_compile else []
    if not results.misses([*SIDES, *compiled_rows]):
        return
    sides = {name: packed(base, *side) for name, side in SIDES.items()}
    results.together(SIDES, lambda: speed(sides, repeats))
    if with_compile:
        models = {name: model for name, (model, _) in sides.items()}
        results.together(compiled_rows, lambda: compiled_speed(models, repeats))


def row_of(name: str, compiled: bool) -> str:
    """Of decoding with a static cache."""
    return f"{name}, {'compiled' if compiled else 'static cache'}"


def speed(sides: dict[str, tuple[PreTrainedModel, int]], repeats: int) -> dict[str, Values]:
    """`disk_bytes`, `prefill_ms` and `decode_tokens_per_s` of every side."""
    models = {name: model for name, (model, _) in sides.items()}
    vocabulary = min(40000, models["fp32"].config.vocab_size)
    prompt = torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    found = inference_speed(models, dict.fromkeys(models, prompt), DECODE_TOKENS, repeats)
    return {name: {"disk_bytes": n_bytes} | found[name] for name, (_, n_bytes) in sides.items()}


def compiled_speed(models: dict[str, PreTrainedModel], repeats: int) -> dict[str, Values]:
    """`decode_tokens_per_s` with and without torch.compile, both with a static cache."""
    prompt = torch.arange(1, 17).unsqueeze(0)
    calls = {
        row_of(name, compiled): compiled_decoder(models[name], prompt, DECODE_TOKENS, compiled)
        for name in COMPILED for compiled in (False, True)
    }  # fmt: skip
    found = interleaved_ms(calls, repeats, "compiled")
    return {name: {"decode_tokens_per_s": spread([1000 * DECODE_TOKENS / ms for ms in samples])}
            for name, samples in found.items()}  # fmt: skip


def main(run: Run) -> None:
    """Measures every side."""
    options = run.options
    settings = {"model": "SmolLM2-135M-Instruct", "prompt_tokens": PROMPT_TOKENS, "decode_tokens": DECODE_TOKENS}
    fill(run.results("quantization_inference", settings), load_model(run.inputs.causal), options.repeats,
         options.compile)  # fmt: skip


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side (default: 7)")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    run_script(parser, main, smoke={"repeats": 2})
