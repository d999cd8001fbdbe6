"""How much a model takes: bytes on disk and in memory, parameters and multiply-adds."""

import math
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_slim.core.counting import MultiplyAdds, count_multiply_adds, reads_tokens
from hf_slim.core.errors import SlimError
from hf_slim.core.modules import device_of, evaluating
from hf_slim.pruning.structure.example_inputs import example_inputs
from hf_slim.pruning.structure.probe import FAILURES
from hf_slim.quantization.transform import is_packed

METADATA = ("report.json", "report.md", "report.png", "README.md", "hf_slim.json")


def disk_bytes(folder: str | Path) -> int:
    """Bytes of a saved model: every file that loading needs, tokenizer included, reports left out."""
    return sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file() and file.name not in METADATA)


def ram_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def parameter_count(model: nn.Module) -> int:
    """Weights and biases that the model computes with; packed codes count one each, scales do not."""
    total, seen = 0, set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                packed = is_packed(module) and parameter.dtype == torch.int8
                total += _logical_size(module, name) if packed else parameter.numel()
    return total


def multiply_adds_per_token(model: nn.Module) -> int:
    """Multiply-adds of all weights for one token, output head included; see `core.counting`.

    A model that does not read text alone has the count of one example: the picture, or the sound and one token, of
    `pruning.structure.example_inputs`.

    Raises: SlimError: if the model cannot be run on a made-up example.
    """
    return sum(_counted(model, 1).weights.values())


def attention_multiply_adds_per_token(model: nn.Module, length: int) -> float:
    """Multiply-adds of attention (queries with keys, probabilities with values) for one token of a text.

    Args:
        length: Tokens of the text, from 2; every token counts with all of them, also where a mask hides some.
    Returns: 0.0 if no such product was seen: torch has no view into attention kernels from other libraries.
    Raises: SlimError: if the model cannot be run on a made-up text of this length.
    """
    return _counted(model, length).attention / length


def counting_unit(model: nn.Module) -> str:
    """What `multiply_adds_per_token` counts for: "token", or "example" where the model does not read text alone."""
    return "token" if reads_tokens(example_inputs(model, 1)) else "example"


def _counted(model: nn.Module, tokens: int) -> MultiplyAdds:
    with torch.random.fork_rng(devices=[]):
        inputs = example_inputs(model, tokens)
    device, dtype = device_of(model), next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    placed = {
        name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    try:
        with evaluating(model):
            return count_multiply_adds(model, lambda: model(**placed), reads_tokens(inputs))
    except FAILURES as error:
        raise SlimError(
            f"Multiply-adds of {type(model).__name__} were not counted, because it could not be run on a made-up "
            f"input of {', '.join(inputs)} ({type(error).__name__}: {error}). Call `hf_slim.core.counting."
            "count_multiply_adds` with an example of your own."
        ) from error


def peak_rss_bytes() -> int:
    """Largest resident memory this process has had so far; it never goes down."""
    status = Path("/proc/self/status")
    if status.exists():  # the portable figure below starts from what the parent process had when it made this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _logical_size(module: nn.Module, name: str) -> int:
    if hasattr(module, "float_shapes"):
        return math.prod(module.float_shapes[name])
    if isinstance(module, nn.Embedding):
        return module.num_embeddings * module.embedding_dim
    return module.in_features * module.out_features
