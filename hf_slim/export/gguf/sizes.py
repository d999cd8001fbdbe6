"""The sizes of every layer, read from its modules: configs say nothing about layers that pruning made different."""

from dataclasses import dataclass

from torch import nn

from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_value, parameter_or_none
from hf_slim.export.codes import is_packed_weight
from hf_slim.export.gguf.architectures import Architecture
from hf_slim.export.gguf.blocks import BLOCK

PRUNE_ALIKE = "Prune with `uniform: true`, so that every layer keeps the same number"


@dataclass(frozen=True)
class Sizes:
    """What each layer has in the file.

    Attributes:
        head_size: Values in one head.
        heads: Query heads of every layer; 0 where pruning removed its attention.
        kv_heads: Key-value heads of every layer.
        widths: Feed-forward neurons of every layer in the model.
        padded: Neurons of every layer in the file; those beyond `widths` are zero and change nothing.
    """

    head_size: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    widths: tuple[int, ...]
    padded: tuple[int, ...]

    @property
    def vary(self) -> bool:
        """Whether layers differ in the file."""
        return any(len(set(sizes)) > 1 for sizes in (self.heads, self.kv_heads, self.padded))

    @property
    def added(self) -> int:
        """Zero neurons in all layers of the file."""
        return sum(self.padded) - sum(self.widths)


def sizes_of(base: nn.Module, row: Architecture) -> Sizes:
    """The sizes of all layers.

    Raises: SlimError: for sizes that llama.cpp does not read for this architecture.
    """
    layers = list(base.get_submodule(row.layers))
    head_size = config_value(base, "head_dim") or config_value(base, "hidden_size") // _heads(base, "attention")
    heads = tuple(_rows(layer, row, "attn_q", head_size, _heads(base, "attention")) for layer in layers)
    kv_heads = tuple(_rows(layer, row, "attn_k", head_size, _heads(base, "key_value")) for layer in layers)
    down = row.module_of("ffn_down")
    widths = tuple(_columns(layer.get_submodule(down)) for layer in layers)
    padded = tuple(_padded(width, layer, down) for width, layer in zip(widths, layers, strict=True))
    if not row.varying:
        padded = (max(padded),) * len(padded)
    sizes = Sizes(head_size, heads, kv_heads, widths, padded)
    _check(base, layers, row, sizes)
    return sizes


def _check(base: nn.Module, layers: list[nn.Module], row: Architecture, sizes: Sizes) -> None:
    for name, counts in (("query heads", sizes.heads), ("key-value heads", sizes.kv_heads)):
        if len(set(counts)) > 1 and not row.varying:
            raise SlimError(
                f"Layers have from {min(counts)} to {max(counts)} {name}, and llama.cpp reads one number for all "
                f"layers of a '{row.name}' model. {PRUNE_ALIKE} of heads."
            )
    hidden = config_value(base, "hidden_size")
    attention_width = sizes.heads[0] * sizes.head_size
    if row.square and attention_width != hidden:
        raise SlimError(
            f"The heads of a layer are {attention_width} values wide, and llama.cpp wants the width of the model, "
            f"{hidden}, for '{row.name}'. Prune neurons (`ffn`) or whole layers instead of heads."
        )
    for index, (layer, count) in enumerate(zip(layers, sizes.heads, strict=True)):
        bias = parameter_or_none(layer.get_submodule(row.module_of("attn_output")), "bias")
        if count == 0 and bias is not None and bias.any():
            raise SlimError(
                f"Layer {index} has no attention but its bias, and llama.cpp has no place for that. Keep its heads."
            )


def _heads(base: nn.Module, kind: str) -> int:
    count = config_value(base, f"num_{kind}_heads")
    return int(count or config_value(base, "num_attention_heads"))


def _rows(layer: nn.Module, row: Architecture, tensor: str, head_size: int, otherwise: int) -> int:
    """Heads that a projection makes; what the config says where all projections are one."""
    module = row.module_of(tensor)
    return vars(layer.get_submodule(module))["out_features"] // head_size if module else otherwise


def _columns(module: nn.Module) -> int:
    return int(vars(module)["in_features"])


def _padded(width: int, layer: nn.Module, down: str) -> int:
    """The neurons that the blocks of a quantized row need; a layer without neurons gets a block of zeros."""
    if width and not is_packed_weight(layer, f"{down}.weight"):
        return width
    return max(BLOCK, -(-width // BLOCK) * BLOCK)
