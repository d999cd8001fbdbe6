"""How much a model takes: bytes on disk and in memory, parameters and multiply-adds."""

import math
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from hf_slim.core.modules import linear_shapes
from hf_slim.quantization.transform import is_packed

METADATA = ("report.json", "report.md", "report.png", "README.md")


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
    """Multiply-adds of all linear layers for one token, output head included; attention scores are not counted."""
    return sum(math.prod(shape) for shape in linear_shapes(model).values())


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
