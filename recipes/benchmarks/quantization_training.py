"""What training on a grid costs: time and memory of one step against plain training, and against torchao's QAT.

A Llama of 4 layers, hidden size 512, 1024 tokens a step, AdamW. All sides take turns in one process; peaks of memory
come from fresh processes of two steps each.

    python recipes/benchmarks/quantization_training.py          # torchao's rows need torchao; five minutes on 2 cores
"""

from collections.abc import Callable

import torch
from harness.command import Run, parser_of, run_script
from harness.results import Values
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_slim import QuantizationConfig, prepare
from hf_slim.evaluation.footprint import peak_rss_bytes
from hf_slim.evaluation.latency import interleaved_ms, spread
from hf_slim.workflows.evaluate import in_fresh_process

OURS = {
    "w4a16-g32": {}, "w8a16": {}, "w3a16-g32": {}, "nf4-g32": {}, "fp4-g32": {}, "codebook4": {}, "fp8": {},
    "w4a16-g32 lsq": {"learn": "lsq"}, "w8a8": {}, "w4a8-g32": {}, "w1.58a8": {},
}  # fmt: skip
# the schemes that torchao has too: (weight bits, group size, quantized activations)
THEIRS = {"w4a16-g32": (4, 32, False), "w8a16": (8, None, False), "w3a16-g32": (3, 32, False),
          "w8a8": (8, None, True), "w4a8-g32": (4, 32, True)}  # fmt: skip
Sizes = dict[str, int]  # of the model and of a step
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 8192, "tokens": 1024}
SMOKE_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96, "tokens": 32}


def plain(sizes: Sizes) -> LlamaForCausalLM:
    """Random weights: time does not depend on what they say."""
    torch.manual_seed(0)
    of_model = {key: value for key, value in sizes.items() if key != "tokens"}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False, **of_model)
    )


def ours(sizes: Sizes, name: str) -> nn.Module:
    """Prepared by hf_slim."""
    scheme = name.split()[0]
    return prepare(plain(sizes), QuantizationConfig(scheme, ignore=["lm_head"], **OURS[name]))


def theirs(sizes: Sizes, name: str) -> nn.Module:
    """Prepared by torchao."""
    from torchao.quantization import PerAxis, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    bits, group_size, with_activations = THEIRS[name]  # its tokens know no symmetric grid
    grain = {"group_size": group_size} if group_size else {"granularity": PerAxis(0)}
    weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), is_symmetric=True, **grain)
    tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if with_activations else None
    model = plain(sizes)
    is_inner = lambda module, path: isinstance(module, nn.Linear) and path != "lm_head"  # noqa: E731
    quantize_(model, QATConfig(activation_config=tokens, weight_config=weights, step="prepare"), filter_fn=is_inner)
    return model


def stepper(model: nn.Module, sizes: Sizes, bf16: bool) -> Callable[[], None]:
    """One optimizer step, callable."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    shape, generator = (2, sizes["tokens"] // 2), torch.Generator().manual_seed(0)
    ids = torch.randint(0, sizes["vocab_size"], shape, generator=generator)
    model.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def builders_of(schemes: list[str], with_torchao: bool) -> dict[str, tuple]:
    """Row name -> (function that builds the model, its arguments after the sizes)."""
    builders = {"plain": (plain,)} | {f"hf_slim {name}": (ours, name) for name in schemes}
    return builders | {f"torchao {name}": (theirs, name) for name in schemes if with_torchao and name in THEIRS}


def measured(builders: dict[str, tuple], sizes: Sizes, repeats: int) -> dict[str, Values]:
    """Rows by name of the side: `fp32_ms`, `bf16_ms` and `peak_bytes`."""
    rows: dict[str, Values] = {name: {} for name in builders}
    for precision in ("fp32", "bf16"):
        models = {name: build(sizes, *arguments) for name, (build, *arguments) in builders.items()}
        steps = {name: stepper(model, sizes, precision == "bf16") for name, model in models.items()}
        for name, samples in interleaved_ms(steps, repeats, precision).items():
            rows[name][f"{precision}_ms"] = spread(samples)
    for name, (build, *arguments) in builders.items():
        rows[name]["peak_bytes"] = in_fresh_process(_peak, torch.get_num_threads(), sizes, build, *arguments)
    return rows


def _peak(threads: int, sizes: Sizes, build: Callable[..., nn.Module], *arguments: str) -> int:
    torch.set_num_threads(threads)
    step = stepper(build(sizes, *arguments), sizes, bf16=False)
    step()
    step()
    return peak_rss_bytes()


def main(run: Run) -> None:
    """Measures what the command line selects."""
    options = run.options
    sizes = SMOKE_SIZES if options.smoke else SIZES
    with_torchao = not options.no_torchao and run.has_peer("torchao")
    builders = builders_of(options.schemes, with_torchao)
    results = run.results("quantization_training", {"model": "Llama", **sizes}, [0], ["torchao"])
    results.together(builders, lambda: measured(builders, sizes, options.repeats))


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="timings of each side (default: 9)")
    parser.add_argument("--schemes", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--no-torchao", action="store_true", help="leave torchao out")
    run_script(parser, main, smoke={"repeats": 2, "schemes": ["w8a8", "w4a16-g32 lsq"]})
