"""Removes tokens from the `tokenizer.json` of a fast tokenizer. Text made of kept tokens is split as before.

Why the result is the same, for each type of tokenizer:

- BPE never undoes a merge, and no merge crosses the border of a final token. So the intermediate tokens are those from
  which each final token is built. If they are kept and the order of merges does not change, the smaller BPE makes the
  same merges as the larger one.
- WordPiece takes the longest match, and Unigram the path with the best score. The best candidate of a set is also the
  best one of a smaller set that contains it, and ties keep their order. The score of an unknown character in Unigram
  depends on the lowest score of all pieces, so the piece with this score is kept.
- WordPiece gives up on a word if one of its characters has no token. This does not change, because tokens of single
  characters are kept. It needs a vocabulary with a token for each character that it uses, such as BERT's.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hf_slim.core.config import require_whole
from hf_slim.core.errors import SlimError

Spec = dict[str, Any]
Parts = Callable[[str], Iterable[str]]


@dataclass(frozen=True)
class Kind:
    """Tokens that a type of tokenizer model needs: single characters, and the parts that a token is built from."""

    alphabet: Callable[[Spec], Iterable[str]]
    parts: Callable[[Spec], Parts]


def complete_kept(spec: Spec, keep_ids: Iterable[int], round_to: int = 1, spare: Iterable[int] = ()) -> list[int]:
    """`keep_ids` and all tokens that must be kept with them, ascending.

    Args:
        spec: Content of a `tokenizer.json`.
        keep_ids: Token ids. Added and special tokens, the unknown token, single characters (or byte tokens) and the
            parts that kept tokens are merged from are always kept.
        round_to: The number of kept tokens is rounded up to a multiple of this, if there are enough tokens.
        spare: Ids that are added first for rounding up; after them, the lowest ids.
    Raises: SlimError: for an id that the tokenizer does not have, or a tokenizer of an unsupported type.
    """
    kind, ids = _kind(spec), token_ids(spec)
    names = {number: token for token, number in ids.items()}
    requested = set(keep_ids)
    unknown = sorted(requested - set(names))
    if unknown:
        raise SlimError(f"`keep_ids` holds {unknown[:5]}, which this tokenizer of {len(names)} tokens does not have.")
    require_whole("round_to", round_to)
    parts = kind.parts(spec["model"])

    def with_parts(number: int) -> set[int]:
        return {number} | {ids[part] for part in parts(names[number]) if part in ids}

    always = _referenced_ids(spec) | {ids[token] for token in kind.alphabet(spec["model"])}
    kept = set().union(*(with_parts(number) for number in requested | (always & set(names))))
    target = min(math.ceil(len(kept) / round_to) * round_to, len(names))
    order = list(dict.fromkeys([*spare, *sorted(names)]))
    while len(kept) < target:  # a token is added once all its parts fit; a token without missing parts always exists
        for number in order:
            more = with_parts(number) | kept if number not in kept and len(kept) < target else kept
            kept = more if len(more) <= target else kept
    return sorted(kept)


def trim_tokenizer_json(
    spec: Spec, keep_ids: Iterable[int], round_to: int = 1, spare: Iterable[int] = ()
) -> tuple[Spec, dict[int, int]]:
    """The tokenizer with only some of its tokens, and `{old id: new id}`; arguments as for `complete_kept`.

    New ids have the order of the old ones, without gaps. `spec` itself is not changed.
    """
    new_ids = {old: new for new, old in enumerate(complete_kept(spec, keep_ids, round_to, spare))}
    trimmed = copy.deepcopy({key: value for key, value in spec.items() if key != "model"})
    trimmed["model"] = _trimmed_model(spec["model"], new_ids)
    for token in trimmed.get("added_tokens") or ():
        token["id"] = new_ids[token["id"]]
    if trimmed.get("padding"):
        trimmed["padding"]["pad_id"] = new_ids[trimmed["padding"]["pad_id"]]
    for processor in _processors(trimmed.get("post_processor")):
        for special in _template_tokens(processor):
            special["ids"] = [new_ids[number] for number in special["ids"]]
        for name in _pair_names(processor):
            processor[name][1] = new_ids[processor[name][1]]
    return trimmed, new_ids


def token_ids(spec: Spec) -> dict[str, int]:
    """Every token of a tokenizer with its id, added ones included."""
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}


def _kind(spec: Spec) -> Kind:
    name = (spec.get("model") or {}).get("type")
    if name not in MODEL_TYPES:
        raise SlimError(
            f"A tokenizer whose model is of type {name!r} cannot be trimmed. Known are {', '.join(MODEL_TYPES)}. If "
            "its tokenizer.json has no type, save the tokenizer with a recent version of `tokenizers` first."
        )
    return MODEL_TYPES[name]


def _trimmed_model(model: Spec, new_ids: dict[int, int]) -> Spec:
    trimmed = dict(model)
    if isinstance(model["vocab"], list):
        trimmed["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new_ids]
    else:
        kept = {token: new_ids[number] for token, number in model["vocab"].items() if number in new_ids}
        trimmed["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    if model.get("unk_id") is not None:
        trimmed["unk_id"] = new_ids[model["unk_id"]]
    if "merges" in model:
        kept = trimmed["vocab"]
        trimmed["merges"] = [
            merge for merge in model["merges"] if kept.keys() >= {*_pair(merge), _merged(model, merge)}
        ]
    return trimmed


def _referenced_ids(spec: Spec) -> set[int]:
    """The ids that the tokenizer uses outside its vocabulary, and the id of the unknown token."""
    found = {token["id"] for token in spec.get("added_tokens") or ()}
    if spec.get("padding"):
        found.add(spec["padding"]["pad_id"])
    for processor in _processors(spec.get("post_processor")):
        found.update(number for special in _template_tokens(processor) for number in special["ids"])
        found.update(processor[name][1] for name in _pair_names(processor))
    unknown = spec["model"].get("unk_id")
    if unknown is None:
        unknown = token_ids(spec).get(spec["model"].get("unk_token"))
    return found if unknown is None else found | {unknown}


def _processors(processor: Spec | None) -> list[Spec]:
    """The post-processor, and all processors inside it if it is a sequence."""
    if not processor:
        return []
    return [processor, *(one for inner in processor.get("processors", ()) for one in _processors(inner))]


def _template_tokens(processor: Spec) -> list[Spec]:
    return list(processor.get("special_tokens", {}).values())


def _pair_names(processor: Spec) -> list[str]:
    """The fields in which BertProcessing and RobertaProcessing have `[token, id]`."""
    return [name for name in ("sep", "cls") if name in processor]


def _pair(merge: str | list[str]) -> tuple[str, ...]:
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def _merged(model: Spec, merge: str | list[str]) -> str:
    first, second = _pair(merge)
    return first + second[len(model.get("continuing_subword_prefix") or "") :]


def _bytes(model: Spec) -> list[str]:
    """The byte tokens, which encode characters without a token; empty if the tokenizer does not use them."""
    names = [f"<0x{number:02X}>" for number in range(256)]
    return names if model.get("byte_fallback") and set(names) <= set(token_ids({"model": model})) else []


def _characters(model: Spec) -> list[str]:
    """Tokens of one character, also with prefix or suffix: text whose longer tokens are removed is split into these.

    In a byte-level vocabulary they are the bytes.
    """
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    tokens = token_ids({"model": model})
    return [token for token in tokens if len(token.removeprefix(prefix).removesuffix(suffix) or token) == 1]


def _characters_or_bytes(model: Spec) -> list[str]:
    return _bytes(model) or _characters(model)


def _unigram_alphabet(model: Spec) -> list[str]:
    lowest, _ = min(model["vocab"], key=lambda entry: entry[1])
    return [lowest, *_characters_or_bytes(model)]


def _no_parts(model: Spec) -> Parts:
    return lambda token: ()


def _bpe_parts(model: Spec) -> Parts:
    """The parts of a token: its characters, and every intermediate token that BPE merges on the way to it."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}

    def parts(token: str) -> set[str]:
        starts, ends = bool(prefix) and token.startswith(prefix), bool(suffix) and token.endswith(suffix)
        pieces = [
            prefix + character for character in token.removeprefix(prefix if starts else "").removesuffix(suffix)
        ]
        if pieces and not starts:
            pieces[0] = pieces[0].removeprefix(prefix)
        if pieces and ends:
            pieces[-1] += suffix
        seen = set(pieces)
        while len(pieces) > 1:
            rank, index = min((ranks.get(pair, math.inf), index) for index, pair in enumerate(pairwise(pieces)))
            if rank == math.inf:
                break  # no merges lead to this token, so it has no parts that matter
            pieces[index : index + 2] = [pieces[index] + pieces[index + 1][len(prefix) :]]
            seen.add(pieces[index])
        return seen

    return parts


MODEL_TYPES = {
    "BPE": Kind(_characters_or_bytes, _bpe_parts),
    "WordPiece": Kind(_characters, _no_parts),
    "WordLevel": Kind(lambda model: (), _no_parts),
    "Unigram": Kind(_unigram_alphabet, _no_parts),
}
