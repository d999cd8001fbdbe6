"""The size of a model: bytes on disk and in memory, parameters and multiply-adds."""

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
    """Bytes of a saved model: all files that loading needs, with the tokenizer and without reports."""
    return sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file() and file.name not in METADATA)


def ram_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def parameter_count(model: nn.Module) -> int:
    """Number of weights and biases; packed weights are counted as in floating point, without scales."""
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

    For a model whose input is not only text, it is the count of one example from `pruning.structure.example_inputs`:
    a picture, or a sound and one token.

    Raises: SlimError: if the model cannot be run on a dummy input.
    """
    return sum(_counted(model, 1).weights.values())


def attention_multiply_adds_per_token(model: nn.Module, length: int) -> float:
    """Multiply-adds of attention (queries with keys, probabilities with values) for one token of a text.

    Args:
        length: Tokens of the text, at least 2; products that a mask hides are counted too.
    Returns: 0.0 if no such product was counted: torch cannot count inside attention kernels of other libraries.
    Raises: SlimError: if the model cannot be run on a dummy text of this length.
    """
    return _counted(model, length).attention / length


def counting_unit(model: nn.Module) -> str:
    """The unit of `multiply_adds_per_token`: "token", or "example" for a model whose input is not only text."""
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
            f"Multiply-adds of {type(model).__name__} were not counted, because it could not be run on a dummy "
            f"input of {', '.join(inputs)} ({type(error).__name__}: {error}). Call `hf_slim.core.counting."
            "count_multiply_adds` with your own example."
        ) from error


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # the portable value below includes the memory of the parent process at the fork
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
