"""Which tensors a file has, and which rows and columns of the model's weights they hold."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError, nearest
from hf_slim.core.host import config_value, field_of
from hf_slim.export.codes import weights_of
from hf_slim.export.gguf.architectures import ARCHITECTURES, Architecture
from hf_slim.export.gguf.sizes import Sizes, sizes_of

SCALABLE = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: In the file, such as "blk.0.attn_q.weight".
        path: Of the parameter in the model.
        rows: Row of the parameter for every row of the file, -1 for a row of zeros; None: as they are.
        columns: Columns in the file; those that the parameter lacks are zeros. None: as they are.
        offset: Added to every value.
        float32: Whether it is written as float32 floats, whatever it is in the model.
        scalable: Whether llama.cpp reads a scale for the whole matrix beside it, `<name>.scale`.
    """

    name: str
    path: str
    rows: Tensor | None = None
    columns: int | None = None
    offset: float = 0.0
    float32: bool = False
    scalable: bool = False

    def arranged(self, matrix: Tensor) -> Tensor:
        """A matrix of the model, or anything with a row for each of its rows, in the order of the file."""
        if self.rows is None:
            return matrix
        if not len(matrix):
            return matrix.new_zeros(len(self.rows), *matrix.shape[1:])
        taken = matrix[self.rows.clamp(min=0)]
        return taken.masked_fill_((self.rows < 0).view(-1, *(1,) * (matrix.dim() - 1)), 0)


@dataclass(frozen=True)
class Layout:
    """What is written for one model.

    Attributes:
        row: How models of its kind are written.
        architecture: The name in the file: the row's, or that of its architecture for layers that vary.
        base: The model without its head.
        sizes: Of all layers.
        entries: All tensors that hold parameters.
    """

    row: Architecture
    architecture: str
    base: nn.Module
    sizes: Sizes
    entries: tuple[Entry, ...]


def layout_of(model: Any) -> Layout:
    """The tensors of the file for a model.

    Raises: SlimError: for an architecture, a config, sizes or parameters that GGUF, or llama.cpp, does not hold.
    """
    kind = str(config_value(model, "model_type"))
    if kind not in ARCHITECTURES:
        raise SlimError(f"No GGUF is written for models of type '{kind}'. {nearest(kind, ARCHITECTURES)}")
    row, base = ARCHITECTURES[kind], model.base_model
    _check_config(base, row)
    sizes = sizes_of(base, row)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    owners = weights_of(model)
    entries = []
    for path, owner in owners.items():
        entry = _entry(path, prefix, row, sizes)
        if entry is None and not path.startswith(tuple(f"{prefix}{start}" for start in row.left_out)):
            raise SlimError(f"A '{row.name}' GGUF has no place for '{path}', so the model cannot be written whole.")
        if entry is not None and entry.name and path == owner:
            entries.append(entry)
    if row.head and f"{row.head[0]}.weight" not in owners:
        raise SlimError(f"{type(model).__name__} has no output head. Load it with AutoModelForCausalLM.")
    architecture = row.varying if sizes.vary or 0 in sizes.heads else row.name
    return Layout(row, architecture, base, sizes, tuple(entries))


def _check_config(base: nn.Module, row: Architecture) -> None:
    config = config_value(base, "text_config") or base.config
    activation = field_of(config, "hidden_act") or field_of(config, "hidden_activation")
    if activation != row.activation:
        raise SlimError(f"llama.cpp computes '{row.name}' with {row.activation}, and this model has {activation}.")
    if reason := row.mismatch(config):
        raise SlimError(reason)


def _entry(path: str, prefix: str, row: Architecture, sizes: Sizes) -> Entry | None:
    """The tensor for a parameter; one without a name for what a layer without attention leaves out; None: no place."""
    module, _, kind = path.rpartition(".")
    if row.head and module == row.head[0]:
        return Entry(f"{row.head[1]}.{kind}", path)
    if not path.startswith(prefix):
        return None
    module = module.removeprefix(prefix)
    if module in row.outer:
        name = row.outer[module]
        return Entry(f"{name}.{kind}", path, offset=_offset(name, row), float32=name in row.float32)
    stack, _, rest = module.removeprefix(f"{row.layers}.").partition(".")
    if not module.startswith(f"{row.layers}.") or rest not in row.inner:
        return None
    return _of_layer(Entry(f"{row.inner[rest]}.{kind}", path), int(stack), rest, row, sizes)


def _of_layer(entry: Entry, index: int, module: str, row: Architecture, sizes: Sizes) -> Entry:
    tensor, kind = entry.name.split(".")
    if sizes.heads[index] == 0 and tensor.startswith("attn_"):
        return Entry("", entry.path)
    width, padded = sizes.widths[index], sizes.padded[index]
    rows, columns = None, None
    if module in row.rotated:
        rows = rotation_order((sizes.heads if tensor == "attn_q" else sizes.kv_heads)[index], sizes.head_size)
    if padded != width and tensor in ("ffn_gate", "ffn_up"):
        starts = (0, width) if row.fused_gate else (0,)
        rows = torch.cat([_padding_order(width, padded, start) for start in starts])
    if padded != width and tensor == "ffn_down" and kind == "weight":
        columns = padded
    scalable = tensor in SCALABLE and kind == "weight"
    name = f"blk.{index}.{entry.name}"
    return Entry(name, entry.path, rows, columns, _offset(tensor, row), scalable=scalable)


def rotation_order(heads: int, head_size: int) -> Tensor:
    """For every row in llama.cpp's order, in which the two rows of a rotation are neighbours, the row of the model.

    transformers rotates row `i` of a head with row `i + head_size / 2`.
    """
    return torch.arange(heads * head_size).view(heads, 2, head_size // 2).transpose(1, 2).flatten()


def _padding_order(width: int, padded: int, start: int) -> Tensor:
    return torch.cat((torch.arange(start, start + width), torch.full((padded - width,), -1)))


def _offset(tensor: str, row: Architecture) -> float:
    return row.norm_offset if tensor.split("_")[-1] == "norm" else 0.0
