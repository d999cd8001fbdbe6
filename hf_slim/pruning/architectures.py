"""Where the prunable structure of a model lies: a table of how its layers are called.

A row says how the parts connect; sizes are read from the modules. A family that uses the names of a row needs no
entry.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from hf_slim.core.errors import SlimError
from hf_slim.pruning.groups import GroupSet, Slice


@dataclass(frozen=True)
class FeedForward:
    """Producers write the hidden neurons, the consumer reads them. Paths are relative to the layer."""

    producers: tuple[str, ...]
    consumer: str


@dataclass(frozen=True)
class Attention:
    """Query, key and value write the heads, the output projection reads them. Paths are relative to the layer."""

    query: str
    key: str
    value: str
    output: str
    head_size: tuple[str, str]  # module (relative), attribute


FEED_FORWARD = (
    FeedForward(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    FeedForward(("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ELECTRA
)
ATTENTION = (
    Attention("q_proj", "k_proj", "v_proj", "o_proj", ("", "head_dim")),
    Attention("self.query", "self.key", "self.value", "output.dense", ("self", "attention_head_size")),
)
WIDTHS = ("intermediate_size",)
HEAD_COUNTS = ("num_attention_heads", "num_heads", "num_key_value_heads", "all_head_size")


def find_group_sets(model: nn.Module) -> list[GroupSet]:
    """Every prunable group set of `model`, in model order.

    Raises: SlimError: if a layer looks like a row of the table but its sizes do not connect, or it cannot be pruned
        without changing the function of the model.
    """
    found = []
    for name, layer in model.named_modules():
        for row in FEED_FORWARD:
            if _has(layer, (*row.producers, row.consumer)):
                found.append(_feed_forward(name, layer, row))
        for row in ATTENTION:
            if _has(layer, (row.query, row.key, row.value, row.output)):
                found.append(_attention(name, layer, row))
    return found


def _has(layer: nn.Module, paths: tuple[str, ...]) -> bool:
    return all(isinstance(_part(layer, path), nn.Linear) for path in paths)


def _part(layer: nn.Module, path: str) -> nn.Module | None:
    for child in filter(None, path.split(".")):
        layer = layer._modules.get(child) if layer is not None else None
    return layer


def _path(name: str, part: str) -> str:
    return ".".join(filter(None, (name, part)))


def _feed_forward(name: str, layer: nn.Module, row: FeedForward) -> GroupSet:
    count = _part(layer, row.consumer).in_features
    for producer in row.producers:
        _check_connected(name, producer, _part(layer, producer).out_features, row.consumer, count)
    slices = [Slice(_path(name, producer), 0, 1) for producer in row.producers]
    slices.append(Slice(_path(name, row.consumer), 1, 1))
    return GroupSet(f"{name}/ffn", "ffn", count, tuple(slices), tuple(_counts(name, layer, count, WIDTHS)))


def _attention(name: str, layer: nn.Module, row: Attention) -> GroupSet:
    holder, attribute = row.head_size
    head_size = getattr(_part(layer, holder), attribute, None)
    query, key, value, output = (_part(layer, path) for path in (row.query, row.key, row.value, row.output))
    if not head_size or key.out_features % head_size or query.out_features % key.out_features:
        raise SlimError(
            f"The attention '{name}' was not understood: head size {head_size}, query {query.out_features}, key "
            f"{key.out_features}. Set `sparsity` for ffn only."
        )
    _check_connected(name, row.query, query.out_features, row.output, output.in_features)
    _check_connected(name, row.key, key.out_features, row.value, value.out_features)
    _check_norms(name, layer, head_size)
    count, shared = key.out_features // head_size, query.out_features // key.out_features
    widths = ((row.query, 0, shared), (row.key, 0, 1), (row.value, 0, 1), (row.output, 1, shared))
    slices = tuple(Slice(_path(name, path), dim, heads * head_size) for path, dim, heads in widths)
    return GroupSet(f"{name}/kv_heads", "kv_heads", count, slices, tuple(_counts(name, layer, count, HEAD_COUNTS)))


def _counts(name: str, layer: nn.Module, count: int, names: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
    """Numbers that modules keep about their own size: (module path, attribute, share of one group)."""
    for child, module in layer.named_modules():
        for attribute in names:
            value = vars(module).get(attribute)
            if type(value) is int and value and value % count == 0:
                yield _path(name, child), attribute, value // count


def _check_connected(name: str, first: str, size: int, second: str, other: int) -> None:
    if size != other:
        raise SlimError(f"In '{name}', '{first}' has size {size} where '{second}' has {other}: they do not connect.")


def _check_norms(name: str, layer: nn.Module, head_size: int) -> None:
    for child, module in layer.named_children():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 1 and child in ("q_norm", "k_norm") and len(weight) != head_size:
            raise SlimError(
                f"'{name}.{child}' normalises over all heads at once, so removing one changes the others. "
                "Heads of this model cannot be pruned; set `sparsity` for ffn only."
            )
