"""Writing tiny models as GGUF, and reading what was written."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_slim import export_model
from hf_slim.workflows.folders.export import Exported
from tests import tiny
from tests.export import models


def written(model: PreTrainedModel, folder: Path, **options: bool) -> Exported:
    return export_model(model, folder / "out", "gguf", models.byte_level(), **options).exports[0]


def formed(model: PreTrainedModel, scheme: str) -> PreTrainedModel:
    return model if scheme == "float" else models.packed(model, scheme)


def tensors(one: Exported) -> dict:
    """The tensors of a file by name, as the package `gguf` reads them."""
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(one.path).tensors}


def forms(one: Exported) -> dict[str, str]:
    return {name: tensor.tensor_type.name for name, tensor in tensors(one).items()}


def field(one: Exported, key: str) -> object:
    """A value of the metadata."""
    from gguf import GGUFReader

    return GGUFReader(one.path).fields[key].contents()


def logits_of(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of the model that plain transformers makes of a file."""
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return tiny.logits(loaded, ids)
