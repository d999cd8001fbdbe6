"""Removes vocabulary rows of a model: in embeddings and output heads; renumbers the token ids in its configs."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.config import SlimConfig, require_whole
from hf_slim.core.contracts import PreparedLayer
from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_of, field_of

ID_ENDINGS = ("_token_id", "_token_index")  # endings of config fields that hold one id or a list of ids
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")  # removed tokens are deleted from these lists
UNSUPPORTED = ("force_words_ids", "sequence_bias", "forced_decoder_ids")  # fields whose ids are not renumbered


@dataclass(frozen=True)
class VocabularyConfig(SlimConfig):
    """Removal, before training, of the tokens that the data never uses, from the model and from the tokenizer."""

    round_to: int = 64
    """The number of rows that is kept is rounded up to a multiple of this whole number of at least 1, because kernels
    are faster for such sizes; the additional rows are further tokens of the original vocabulary."""

    def __post_init__(self) -> None:
        require_whole("round_to", self.round_to)


def used_tokens(sequences: Iterable[Iterable[int]]) -> Counter[int]:
    """How often each token id occurs in sequences of ids."""
    counts: Counter[int] = Counter()
    for sequence in sequences:
        counts.update(sequence)
    return counts


def special_ids(model: nn.Module) -> set[int]:
    """The token ids that the configs of a model name, such as `eos_token_id`; ids without a row are omitted."""
    size = _tables(model)[0].num_embeddings
    return {number for _, _, value in _named_ids(model, size) for number in _as_list(value) if 0 <= number < size}


def trim_vocabulary_(model: nn.Module, keep_ids: Iterable[int]) -> dict[int, int]:
    """Keeps only some rows of the vocabulary; logits of kept tokens do not change. Call it before training.

    Tied weights remain tied. Ids in configs, `vocab_size`, `padding_idx` and biases of the head are updated. An id in
    a config that has no row (GPT-2's 50256 in a model of 96 rows) is not changed.

    Args:
        model: A model with `get_input_embeddings`, and with `get_output_embeddings` if it has a head over the tokens.
        keep_ids: Must contain `special_ids(model)`. New ids have the order of the old ones, without gaps.
    Returns: `{old id: new id}`.
    Raises: SlimError: if an id is missing or has no row, or the vocabulary is not one plain table of floats.
    """
    tables = _tables(model)
    size = tables[0].num_embeddings
    kept = sorted(set(keep_ids))
    new_ids = {old: new for new, old in enumerate(kept)}
    heads = _heads(model, size)
    _check_ids(model, kept, size)
    _check_plain([*tables, *heads], size)
    _check_paddings(model, tables, new_ids)
    _keep_rows_(_row_tensors(model, tables, heads, size), torch.tensor(kept), size)
    for table in tables:
        table.num_embeddings = len(kept)
    for head in heads:
        head.out_features = len(kept)
    _renumber_modules_(model, new_ids, size)
    for config, name, value in list(_named_ids(model, size)):
        numbers = [new_ids.get(number, number) for number in _as_list(value)]
        setattr(config, name, numbers if isinstance(value, (list, tuple)) else numbers[0])
    for config in _configs(model, size):
        _renumber_config_(config, new_ids, size)
    return new_ids


def _tables(model: nn.Module) -> list[nn.Embedding]:
    """The token embeddings of a model and of its parts (an encoder, a decoder), each once."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        try:
            table = module.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(table, nn.Embedding):
            found.setdefault(id(table), table)
    tables = list(found.values())
    if not tables:
        raise SlimError(
            f"{type(model).__name__} has no table of token embeddings (`get_input_embeddings` gives no nn.Embedding), "
            "so there is no vocabulary to trim. Merge adapters and trim before quantizing."
        )
    sizes = sorted({table.num_embeddings for table in tables})
    if len(sizes) > 1:
        raise SlimError(
            f"{type(model).__name__} has several vocabularies, of {sizes} tokens. Trim its parts one at a time."
        )
    return tables


def _heads(model: nn.Module, size: int) -> list[nn.Linear]:
    find = field_of(model, "get_output_embeddings")
    head = find() if find else None
    if head is None:
        return []
    if not isinstance(head, nn.Linear) or head.out_features != size:
        raise SlimError(
            f"The output head is {head}, and only a plain nn.Linear with {size} rows, one per token, can be trimmed. "
            "Trim before quantizing or adding adapters."
        )
    return [head]


def _check_ids(model: nn.Module, kept: list[int], size: int) -> None:
    if not kept or kept[0] < 0 or kept[-1] >= size:
        ends = f"from {kept[0]} to {kept[-1]}" if kept else "none"
        raise SlimError(
            f"`keep_ids` must be ids from 0 to {size - 1}, got {ends}. Check that the tokenizer belongs to the model."
        )
    removed = set(range(size)) - set(kept)
    lost = {name: value for _, name, value in _named_ids(model, size) if removed.intersection(_as_list(value))}
    if lost:
        raise SlimError(f"`keep_ids` lacks ids that the config names: {lost}. Add `special_ids(model)` to it.")
    for config in _configs(model, size):
        unsupported = [name for name in UNSUPPORTED if field_of(config, name)]
        if unsupported:
            raise SlimError(
                f"{type(config).__name__} has token ids in {unsupported}, which are not renumbered. Set these fields "
                "to None and call it again."
            )


def _check_plain(modules: list[nn.Module], size: int) -> None:
    for module in modules:
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        others = [name for name, tensor in tensors.items() if name not in ("weight", "bias") and len(tensor.shape)]
        weight = tensors.get("weight")
        if isinstance(module, PreparedLayer) or others or weight is None or not weight.is_floating_point():
            raise SlimError(
                f"{type(module).__name__} of the vocabulary is not a plain table of floats (other tensors: {others}). "
                "Trim the vocabulary first, then prepare or quantize."
            )


def _check_paddings(model: nn.Module, tables: list[nn.Embedding], new_ids: dict[int, int]) -> None:
    for name, module in model.named_modules():
        padding = vars(module).get("padding_idx")
        foreign = isinstance(module, nn.Embedding) and module not in tables
        if foreign and padding is not None and new_ids.get(padding, padding) != padding:
            raise SlimError(
                f"'{name}' counts positions from the id of the padding token, which would change from {padding} to "
                f"{new_ids[padding]}. Keep all ids below {padding} too."
            )


def _row_tensors(
    model: nn.Module, tables: list[nn.Embedding], heads: list[nn.Linear], size: int
) -> list[tuple[dict[str, Any], str, int]]:
    """Every tensor with one slice per token: (dictionary that holds it, name, dimension).

    In addition to embeddings and heads, these are biases of the module around a head (BERT's `predictions.bias`) or of
    the model (BART's `final_logits_bias`).
    """
    found = []
    holders = [module for module in model.modules() if any(child in heads for child in module.children())]
    for module in dict.fromkeys([*tables, *heads, *holders, model]):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.dim():
                    continue
                if module in tables or module in heads or tensor.numel() == tensor.shape[-1] == size:
                    found.append((tensors, name, 0 if module in tables or module in heads else -1))
    return found


@torch.no_grad()
def _keep_rows_(tensors_of_rows: list[tuple[dict[str, Any], str, int]], kept: Tensor, size: int) -> None:
    """Replaces each tensor by its kept slices; shared tensors remain shared."""
    smaller: dict[int, Tensor] = {}
    old = [(tensors, name, dim, tensors[name]) for tensors, name, dim in tensors_of_rows]
    for tensors, name, dim, tensor in old:
        if id(tensor) not in smaller:
            rows = tensor.index_select(dim, kept.to(tensor.device))
            smaller[id(tensor)] = (
                nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows
            )
        tensors[name] = smaller[id(tensor)]


def _renumber_modules_(model: nn.Module, new_ids: dict[int, int], size: int) -> None:
    for module in model.modules():
        if vars(module).get("vocab_size") == size:
            module.vocab_size = len(new_ids)
        if type(vars(module).get("padding_idx")) is int:
            module.padding_idx = new_ids.get(module.padding_idx, module.padding_idx)


def _configs(model: nn.Module, size: int) -> list[Any]:
    """Every config with ids of this vocabulary: of the model, its parts and its generation, and those inside them."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if config is not None and id(config) not in found:
            if field_of(config, "vocab_size", size) == size:
                found[id(config)] = config
            for inner in vars(config).values():
                if hasattr(inner, "to_dict") and hasattr(inner, "__dict__"):
                    add(inner)

    for module in model.modules():
        add(config_of(module))
        add(field_of(module, "generation_config"))
    return list(found.values())


def _named_ids(model: nn.Module, size: int) -> Iterator[tuple[Any, str, Any]]:
    """(config, name, id or ids) of every token id that a config holds."""
    for config in _configs(model, size):
        for name, value in list(vars(config).items()):
            if name.endswith(ID_ENDINGS) and value is not None and type(value) is not bool:
                yield config, name, value


def _as_list(value: int | list[int]) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _renumber_config_(config: Any, new_ids: dict[int, int], size: int) -> None:
    for name in SUPPRESSED:
        if ids := field_of(config, name):
            setattr(config, name, [new_ids[number] for number in ids if number in new_ids])
    if field_of(config, "bad_words_ids"):
        words = [word for word in config.bad_words_ids if all(number in new_ids for number in word)]
        config.bad_words_ids = [[new_ids[number] for number in word] for word in words] or None
    if field_of(config, "vocab_size") is not None:
        config.vocab_size = len(new_ids)
