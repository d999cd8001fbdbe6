"""A fast tokenizer with fewer tokens, on the content of its `tokenizer.json`: text that it can write is unchanged.

Why it does. BPE never undoes a merge, and no merge crosses the border of a token that it ends with; so what it passes
through is exactly what each final token, alone, is built from. With those parts kept and ranks in their order, every
step of the smaller BPE is the step of the larger one. WordPiece takes the longest match and Unigram the best path:
the winner of a set still wins in a subset that holds it, with ties in the same order. What Unigram charges for an
unknown character hangs on its lowest score, so the piece that has it stays. A word that WordPiece gives up on has a
character without a token of its own; that stays so as long as the vocabulary spells every character it uses, as
BERT's does.
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
    """What a kind of tokenizer model cannot do without: characters, and the parts that a token is built from."""

    alphabet: Callable[[Spec], Iterable[str]]
    parts: Callable[[Spec], Parts]


def complete_kept(spec: Spec, keep_ids: Iterable[int], round_to: int = 1, spare: Iterable[int] = ()) -> list[int]:
    """`keep_ids` and all tokens that must be kept with them, ascending.

    Args:
        spec: Content of a `tokenizer.json`.
        keep_ids: Token ids. Added and special tokens, the unknown token, single characters (or byte tokens) and the
            parts that kept tokens are merged from are always kept.
        round_to: The number of kept tokens grows to a multiple of this, as far as there are tokens.
        spare: Ids to fill up with first; after them come those with the lowest ids.
    Raises: SlimError: for an id that the tokenizer does not have, or a kind of tokenizer that is not known.
    """
    kind, ids = _kind(spec), token_ids(spec)
    names = {number: token for token, number in ids.items()}
    asked = set(keep_ids)
    unknown = sorted(asked - set(names))
    if unknown:
        raise SlimError(f"`keep_ids` holds {unknown[:5]}, which this tokenizer of {len(names)} tokens does not have.")
    require_whole("round_to", round_to)
    parts = kind.parts(spec["model"])

    def with_parts(number: int) -> set[int]:
        return {number} | {ids[part] for part in parts(names[number]) if part in ids}

    always = _referenced_ids(spec) | {ids[token] for token in kind.alphabet(spec["model"])}
    kept = set().union(*(with_parts(number) for number in asked | (always & set(names))))
    target = min(math.ceil(len(kept) / round_to) * round_to, len(names))
    order = list(dict.fromkeys([*spare, *sorted(names)]))
    while len(kept) < target:  # a token without its parts comes in a later round: one that lacks none always exists
        for number in order:
            more = with_parts(number) | kept if number not in kept and len(kept) < target else kept
            kept = more if len(more) <= target else kept
    return sorted(kept)


def trim_tokenizer_json(
    spec: Spec, keep_ids: Iterable[int], round_to: int = 1, spare: Iterable[int] = ()
) -> tuple[Spec, dict[int, int]]:
    """The tokenizer with only some of its tokens, and `{old id: new id}`; arguments as for `complete_kept`.

    New ids follow the order of the old ones without gaps. `spec` itself is not changed.
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
            f"A tokenizer whose model is of type {name!r} cannot be trimmed. Known are {', '.join(MODEL_TYPES)}; save "
            "it once with a recent `tokenizers` if its tokenizer.json names no type."
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
    """Ids that the tokenizer names outside its vocabulary, and the unknown token's."""
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
    """A post-processor, or those that a sequence of them consists of."""
    if not processor:
        return []
    return [processor, *(one for inner in processor.get("processors", ()) for one in _processors(inner))]


def _template_tokens(processor: Spec) -> list[Spec]:
    return list(processor.get("special_tokens", {}).values())


def _pair_names(processor: Spec) -> list[str]:
    """Where BertProcessing and RobertaProcessing keep `[token, id]`."""
    return [name for name in ("sep", "cls") if name in processor]


def _pair(merge: str | list[str]) -> tuple[str, ...]:
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def _merged(model: Spec, merge: str | list[str]) -> str:
    first, second = _pair(merge)
    return first + second[len(model.get("continuing_subword_prefix") or "") :]


def _bytes(model: Spec) -> list[str]:
    """The tokens that spell any character which has none of its own, if there are any."""
    names = [f"<0x{number:02X}>" for number in range(256)]
    return names if model.get("byte_fallback") and set(names) <= set(token_ids({"model": model})) else []


def _characters(model: Spec) -> list[str]:
    """Tokens of one character, with prefix or suffix too: they spell whatever has no token any more.

    In a byte-level vocabulary these are the bytes.
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
    """For a token, every piece that BPE passes through from its characters to itself."""
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
            rank, place = min((ranks.get(pair, math.inf), place) for place, pair in enumerate(pairwise(pieces)))
            if rank == math.inf:
                break  # no merges lead to this token, so it has no parts that matter
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1][len(prefix) :]]
            seen.add(pieces[place])
        return seen

    return parts


MODEL_TYPES = {
    "BPE": Kind(_characters_or_bytes, _bpe_parts),
    "WordPiece": Kind(_characters, _no_parts),
    "WordLevel": Kind(lambda model: (), _no_parts),
    "Unigram": Kind(_unigram_alphabet, _no_parts),
}
