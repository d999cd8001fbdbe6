"""Prefill and decoding of exported models in ONNX Runtime, beside eager PyTorch: the first 4 layers of SmolLM2-135M.

All sides run in one process, in turn, with the same number of threads. Every side computes the logits of all tokens
of the prompt, as the exported graph does. The model is cut because an export of all its layers takes long.

python recipes/benchmarks/export_runtimes.py             # 5 minutes on 2 cores; needs `pip install -e '.[onnx]'`
python recipes/benchmarks/export_runtimes.py --layers 30
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness.command import Run, parser_of, run_script
from harness.results import Results, Values
from transformers import PreTrainedModel

from hf_slim import QuantizationConfig, convert, export_model, prepare
from hf_slim.evaluation.footprint import disk_bytes
from hf_slim.evaluation.latency import interleaved_ms, spread
from hf_slim.integration.kv_cache import cache_argument, cache_of
from hf_slim.integration.loading import load_model

TORCH = "PyTorch fp32, eager"
SIDES = {  # exported to ONNX
    "ONNX Runtime fp32": None,
    "ONNX Runtime w8a8": QuantizationConfig("w8a8", embeddings="w8a8"),
    "ONNX Runtime w4a16-g64": QuantizationConfig("w4a16-g64", embeddings="w8a8"),
}
PEERS = ("onnx", "onnxruntime", "onnxscript")
PROMPT_TOKENS, DECODE_TOKENS = 256, 32
Decoder = tuple[Callable[[], None], Callable[[], None]]  # prefill, and decoding after it


def cut(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model with its first layers only."""
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


def in_torch(model: PreTrainedModel, prompt: torch.Tensor) -> Decoder:
    """Greedy decoding in eager PyTorch."""
    argument, last = cache_argument(model), {}

    @torch.inference_mode()
    def step(token: torch.Tensor, cache: object) -> None:
        output = model(input_ids=token, use_cache=True, **{argument: cache})
        last["cache"], last["token"] = cache_of(output), output.logits[:, -1:].argmax(-1)

    def decode() -> None:
        for _ in range(DECODE_TOKENS):
            step(last["token"], last["cache"])
        last["cache"].crop(-DECODE_TOKENS)

    return lambda: step(prompt, None), decode


def in_onnxruntime(file: Path, prompt: torch.Tensor) -> Decoder:
    """Greedy decoding with a session of ONNX Runtime, the cache handed back and forth as arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    taken = {one.name: one.shape for one in session.get_inputs() if "layers" in one.name}
    given = [one.name for one in session.get_outputs()]
    back = {name: given.index(f"output.{name.removeprefix('input.')}") for name in taken}
    empty = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in taken.items()}
    last: dict = {}

    def step(token: np.ndarray, cache: dict[str, np.ndarray]) -> None:
        held = next(iter(cache.values())).shape[2]
        place = np.arange(held, held + token.shape[1])[None]
        mask = np.ones((1, held + token.shape[1]), np.int64)
        feed = {"input_ids": token, "attention_mask": mask, "position_ids": place, **cache}
        outputs = session.run(None, feed)
        last["cache"] = {name: outputs[index] for name, index in back.items()}
        last["token"] = outputs[given.index("logits")][:, -1:].argmax(-1)

    def decode() -> None:
        start = last["cache"], last["token"]
        for _ in range(DECODE_TOKENS):
            step(last["token"], last["cache"])
        last["cache"], last["token"] = start

    return lambda: step(prompt.numpy(), empty), decode


def measured(base: PreTrainedModel, names: list[str], repeats: int, folder: Path) -> dict[str, Values]:
    """`disk_bytes`, `prefill_ms` and `decode_tokens_per_s` of every side."""
    vocabulary = min(40000, base.config.vocab_size)
    prompt = torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    base.eval().save_pretrained(folder / "base")
    decoders, sizes = {TORCH: in_torch(base, prompt)}, {TORCH: disk_bytes(folder / "base")}
    for name in names:
        model = copy.deepcopy(base)
        if SIDES[name] is not None:
            convert(prepare(model, SIDES[name]))
        export = export_model(model, folder / name, "onnx").exports[0]
        decoders[name], sizes[name] = in_onnxruntime(export.path, prompt), export.size_bytes
    prefills = interleaved_ms({name: one[0] for name, one in decoders.items()}, repeats, "prefill")
    decodes = interleaved_ms({name: one[1] for name, one in decoders.items()}, repeats, "decode")
    return {
        name: {
            "disk_bytes": sizes[name],
            "prefill_ms": spread(prefills[name]),
            "decode_tokens_per_s": spread([1000 * DECODE_TOKENS / sample for sample in decodes[name]]),
        }
        for name in decoders
    }


def main(run: Run) -> None:
    """Measures every side that is installed."""
    options = run.options
    settings = {
        "model": f"SmolLM2-135M-Instruct, first {options.layers} layers", "prompt_tokens": PROMPT_TOKENS,
        "decode_tokens": DECODE_TOKENS,
    }  # fmt: skip
    results: Results = run.results("export_runtimes", settings, peers=PEERS)
    missing = [package for package in PEERS if not run.has_peer(package)]
    names = [] if missing else list(SIDES)
    if results.misses([TORCH, *names]):
        base = cut(load_model(run.inputs.causal), options.layers)
        with tempfile.TemporaryDirectory() as folder:
            results.together([TORCH, *names], lambda: measured(base, names, options.repeats, Path(folder)))


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=4, help="layers that are kept (default: 4)")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side (default: 7)")
    run_script(parser, main, smoke={"layers": 1, "repeats": 1})
