"""What training on a grid costs: time and memory of one step against plain training, and against torchao's QAT.

A Llama of 4 layers, hidden size 512, 1024 tokens a step, AdamW. All sides take turns in one process; medians.

    python recipes/benchmarks/quantization_training.py          # torchao's rows need torchao; three minutes on 2 cores
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_slim import QuantizationConfig, prepare
from hf_slim.evaluation.footprint import peak_rss_bytes
from hf_slim.evaluation.latency import interleaved_ms, spread
from hf_slim.workflows.evaluate import in_fresh_process, quiet_libraries

OURS = {
    "w4a16-g32": {}, "w8a16": {}, "w3a16-g32": {}, "nf4-g32": {}, "fp4-g32": {}, "codebook4": {}, "fp8": {},
    "w4a16-g32 lsq": {"learn": "lsq"}, "w8a8": {}, "w4a8-g32": {}, "w1.58a8": {},
}  # fmt: skip
# the schemes that torchao has too: (weight bits, group size, quantized activations)
THEIRS = {"w4a16-g32": (4, 32, False), "w8a16": (8, None, False), "w3a16-g32": (3, 32, False),
          "w8a8": (8, None, True), "w4a8-g32": (4, 32, True)}  # fmt: skip
TOKENS = 1024


def plain_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False,
    ))  # fmt: skip


def ours(name: str) -> nn.Module:
    scheme = name.split()[0]
    return prepare(plain_model(), QuantizationConfig(scheme, ignore=["lm_head"], **OURS[name]))


def theirs(name: str) -> nn.Module:
    from torchao.quantization import PerAxis, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    bits, group_size, with_activations = THEIRS[name]  # its tokens know no symmetric grid
    grain = {"group_size": group_size} if group_size else {"granularity": PerAxis(0)}
    weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), is_symmetric=True, **grain)
    tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if with_activations else None
    model = plain_model()
    is_inner = lambda module, path: isinstance(module, nn.Linear) and path != "lm_head"  # noqa: E731
    quantize_(model, QATConfig(activation_config=tokens, weight_config=weights, step="prepare"), filter_fn=is_inner)
    return model


def stepper(model: nn.Module, bf16: bool) -> Callable[[], None]:
    """One optimizer step, callable."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    ids = torch.randint(0, 8192, (2, TOKENS // 2), generator=torch.Generator().manual_seed(0))
    model.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peak(build: Callable[..., nn.Module], *arguments: str) -> int:
    torch.set_num_threads(2)
    step = stepper(build(*arguments), bf16=False)
    step()
    step()
    return peak_rss_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-torchao", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    builders = {"plain": plain_model} | {f"hf_slim {name}": lambda name=name: ours(name) for name in OURS}
    if not options.no_torchao:
        builders |= {f"torchao {name}": lambda name=name: theirs(name) for name in THEIRS}
    ratios: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "bf16"):
        steps = {name: stepper(build(), precision == "bf16") for name, build in builders.items()}
        medians = {k: spread(v)["median"] for k, v in interleaved_ms(steps, options.repeats, precision).items()}
        ratios[precision] = {name: medians[name] / medians["plain"] for name in medians}
        print(f"plain step, {precision}: {medians['plain']:.0f} ms", flush=True)
    peak = {"plain": in_fresh_process(_peak, plain_model)}
    peak |= {f"hf_slim {name}": in_fresh_process(_peak, ours, name) for name in OURS}
    print("\n| scheme | fp32 step | torchao | bf16 step | torchao | peak memory |\n|---|---:|---:|---:|---:|---:|")
    for name in OURS:
        row = [f"{ratios[p].get(f'{who} {name}', float('nan')):.2f}x".replace("nanx", "-")
               for p in ("fp32", "bf16") for who in ("hf_slim", "torchao")]  # fmt: skip
        print(f"| {name} | {' | '.join(row)} | {peak[f'hf_slim {name}'] / peak['plain'] - 1:+.1%} |")


if __name__ == "__main__":
    main()
