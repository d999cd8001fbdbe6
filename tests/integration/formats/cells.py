"""Cells of the matrix of saved folders: family x scheme x layers x tying x dtype."""

import itertools
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_slim import PruningConfig, QuantizationConfig, convert, prepare
from tests import families, tiny

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert_mlm", "t5")
SCHEMES = {
    "w8a8": {}, "w4a8": {}, "w8a16": {}, "w5a16": {}, "w4a16": {}, "w3a16": {}, "w2a16": {},
    "w4a16-g16": {}, "w3a16-g8": {}, "w8a16-g16": {}, "w6a8-g16": {},
    "w8a16-tensor": {}, "w4a16-g16-asym": {}, "w8a8-asym": {}, "w4a16-unsigned": {}, "w4a16-asym-unsigned-floor": {},
    "w8a16 and embeddings": {"scheme": "w8a16", "embeddings": "w8a16"},
    "w4a16 and embeddings": {"scheme": "w4a16", "embeddings": "w2a16"},
    "w4a16-g16 and embeddings": {"scheme": "w4a16-g16", "embeddings": "w8a16"},
    "nf4": {"scheme": "nf4-g32"}, "fp4": {"scheme": "fp4-g32"}, "fp8": {}, "codebook3": {}, "w1.58a8": {},
}  # fmt: skip
LAYERS = ("alike", "other schemes", "other sizes")
WIDE = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32}
OWN_EMBEDDING = ("gemma3",)  # computes in its own way, so neither it nor a head that is tied to it is quantized
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Cell:
    family: str
    scheme: str
    layers: str
    tied: bool
    dtype: torch.dtype

    def model(self) -> PreTrainedModel:
        """A packed model."""
        model = plain_model(self.family, self.tied, self.dtype)
        settings = {"scheme": self.scheme} | SCHEMES[self.scheme]
        if self.layers == "other schemes":
            settings["overrides"] = {first_linear(model): "w8a16"}
        configs = [QuantizationConfig(**settings)]
        if self.layers == "other sizes":
            configs.append(PruningConfig(sparsity={"ffn": 0.4}, uniform=False, criterion="l2"))
        return convert(prepare(model, *configs))


def plain_model(family: str, tied: bool = True, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model as `from_pretrained` gives it, whose widths are multiples of 32."""
    sizes = WIDE if family in ("llama", "qwen3", "gemma3") else {}
    if family in tiny.ALL_FAMILIES:
        model = tiny.ALL_FAMILIES[family](tie_word_embeddings=tied, **sizes)
    else:
        model = families.FAMILIES[family].build(tie_word_embeddings=tied, **sizes)
    with tempfile.TemporaryDirectory() as folder:  # `.to` would narrow rotary buffers
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=dtype)


def first_linear(model: nn.Module) -> str:
    """The name of a layer that every scheme quantizes."""
    kinds = ("Linear", "Conv1D")
    inner = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    return inner[0]


def cells(family: str, dtype: torch.dtype) -> list[Cell]:
    every = (Cell(family, *rest, dtype) for rest in itertools.product(SCHEMES, LAYERS, (True, False)))
    return [cell for cell in every if not (cell.family in OWN_EMBEDDING and cell.tied and "embeddings" in cell.scheme)]


def some_cells(family: str, dtype: torch.dtype, count: int, seed: int) -> list[Cell]:
    return random.Random(seed).sample(cells(family, dtype), count)


def written(folder: Path) -> dict[str, bytes]:
    """The content of every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
