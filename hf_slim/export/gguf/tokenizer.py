"""A fast tokenizer as metadata of GGUF: byte-level BPE, sentencepiece's BPE, or WordPiece."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError
from hf_slim.export.gguf.metadata import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "\u2581"  # how sentencepiece writes a space

# How text is cut before merges, as tokenizer.json says it -> llama.cpp's name for that. The pattern is enough: names
# that stand for the same pattern differ only in whether whole words skip the merges.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_OPTIONAL = (f"{_CONTRACTIONS}?",) * 2
SPLITS: dict[tuple[str, ...], tuple[str, str]] = {  # -> (words are merged, whole words skip the merges)
    ("gpt2",): ("gpt-2", ""),
    ("digits", "gpt2"): ("smollm", ""),
    (rf"{_CONTRACTIONS}{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_ENDS}",): ("qwen2", ""),
    (rf"{_CONTRACTIONS}{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_ENDS}",): ("smaug-bpe", "llama-bpe"),
    (rf"{_CASED % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDS}",): ("", "tekken"),
    (rf"{_CASED % (2 * (f'{_CONTRACTIONS}?',))}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDS}",): (
        "gpt-4o",
        "",
    ),
}


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase | None, rows: int) -> Metadata:
    """The tokenizer of a file.

    Args:
        rows: Of the model's embedding; each is a token, and those that the tokenizer lacks are marked unused.
    Raises: SlimError: for a tokenizer that llama.cpp does not have, or that has more tokens than the model.
    """
    if tokenizer is None or not tokenizer.is_fast:
        raise SlimError(
            "GGUF needs the model's tokenizer in its fast form, with a tokenizer.json; got "
            f"{type(tokenizer).__name__}."
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= rows:
        raise SlimError(
            f"The tokenizer has tokens up to {max(ids.values())}, and the model has {rows} rows. Give the tokenizer "
            "that belongs to the model."
        )
    kind = spec["model"]["type"]
    if kind == "WordPiece":
        own = _word_pieces(spec, _tokens(spec, ids, rows))
    elif kind == "BPE" and spec["model"].get("byte_fallback"):
        own = _sentencepiece(spec, _tokens(spec, ids, rows))
    elif kind == "BPE" and (split := _split(spec)):
        own = _byte_level(spec, _tokens(spec, ids, rows), split)
    else:
        raise SlimError(
            f"This tokenizer ({kind}, cut by {json.dumps(spec['pre_tokenizer'])[:200]}) has no counterpart in "
            "llama.cpp. It has byte-level BPE with the cuts of "
            f"{', '.join(sorted(name for names in SPLITS.values() for name in names if name))}; sentencepiece's BPE; "
            "lower-case WordPiece."
        )
    special = _special(tokenizer, surrounds=kind == "WordPiece")
    return {f"tokenizer.{key}": value for key, value in (own | special).items()}


def _tokens(spec: dict[str, Any], ids: dict[str, int], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of the token of every row."""
    added = {token["id"]: token for token in spec["added_tokens"]}
    texts, types = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    for text, number in ids.items():
        texts[number], types[number] = text, NORMAL
        if number in added:
            types[number] = CONTROL if added[number]["special"] else USER_DEFINED
    return texts, types


def _byte_level(spec: dict[str, Any], tokens: tuple[list[str], list[int]], split: str) -> Metadata:
    normalizer = spec["normalizer"] or {"type": "NFC"}  # NFC is left out by llama.cpp: text mostly is in that form
    if normalizer["type"] != "NFC":
        raise SlimError(f"llama.cpp does not change text as this tokenizer's {normalizer['type']} normalizer does.")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    return {
        "ggml.model": "gpt2", "ggml.pre": split, "ggml.tokens": tokens[0], "ggml.token_type": tokens[1],
        "ggml.merges": merges,
    }  # fmt: skip


def _split(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text; "" for none."""
    steps = spec["pre_tokenizer"] or {"type": ""}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return ""
    cuts = [
        "digits" if step["type"] == "Digits" and step["individual_digits"] else
        step["pattern"].get("Regex", "") if step["type"] == "Split" and step["behavior"] == "Isolated" else ""
        for step in steps[:-1]
    ]  # fmt: skip
    names = SPLITS.get((*cuts, *(["gpt2"] if steps[-1]["use_regex"] else [])), ("", ""))
    whole_words = bool(spec["model"].get("ignore_merges"))
    return names[1] if whole_words else names[0]


def _sentencepiece(spec: dict[str, Any], tokens: tuple[list[str], list[int]]) -> Metadata:
    """Scores that order merges as the list of merges does: of a token, the place of the first merge that makes it."""
    texts, types = tokens
    places: dict[str, int] = {}
    for place, pair in enumerate(spec["model"]["merges"]):
        places.setdefault("".join(pair if not isinstance(pair, str) else pair.split(" ")), place)
    unknown = spec["model"].get("unk_token")
    for number, text in enumerate(texts):
        if types[number] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = BYTE
        if text == unknown:
            types[number] = UNKNOWN
        if types[number] == USER_DEFINED:
            texts[number] = text.replace(SPACE, " ")
    return {
        "ggml.model": "llama", "ggml.pre": "default", "ggml.tokens": texts, "ggml.token_type": types,
        "ggml.scores": [-float(places.get(text, len(places))) for text in texts],
        "ggml.add_space_prefix": _adds_space(spec),
    }  # fmt: skip


def _adds_space(spec: dict[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer, cut = spec["normalizer"] or {}, spec["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or (
        cut.get("type") == "Metaspace" and cut.get("prepend_scheme") != "never"
    )


def _word_pieces(spec: dict[str, Any], tokens: tuple[list[str], list[int]]) -> Metadata:
    normalizer = spec["normalizer"] or {}
    if normalizer.get("type") != "BertNormalizer" or not normalizer.get("lowercase"):
        raise SlimError("llama.cpp makes text lower case before WordPiece, and this tokenizer keeps capitals.")
    prefix = spec["model"]["continuing_subword_prefix"]
    texts = [
        text if kind in (CONTROL, UNUSED) else text.removeprefix(prefix) if text.startswith(prefix) else SPACE + text
        for text, kind in zip(*tokens, strict=True)
    ]
    return {
        "ggml.model": "bert", "ggml.pre": "default", "ggml.tokens": texts, "ggml.token_type": tokens[1],
        "ggml.token_type_count": 2,
    }  # fmt: skip


def _special(tokenizer: PreTrainedTokenizerBase, surrounds: bool) -> Metadata:
    """Numbers of special tokens, which of them surround a text, and the chat template.

    Args:
        surrounds: Whether a text stands between the tokens for a class and a separator, as BERT has it.
    """
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts, ends = whole[:1] != bare[:1], whole[-1:] != bare[-1:]
    names = {
        "bos": tokenizer.cls_token_id if surrounds else tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id, "seperator": tokenizer.sep_token_id, "padding": tokenizer.pad_token_id,
        "mask": tokenizer.mask_token_id,
    }  # fmt: skip
    found: Metadata = {f"ggml.{name}_token_id": number for name, number in names.items() if number is not None}
    found |= {"ggml.add_bos_token": starts, "ggml.add_eos_token": ends and not surrounds}
    if surrounds:
        found["ggml.add_sep_token"] = ends
    if isinstance(tokenizer.chat_template, str):
        found["chat_template"] = tokenizer.chat_template
    return found
