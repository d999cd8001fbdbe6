"""Removes from a model and its tokenizer the tokens that a text never uses."""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError
from hf_slim.core.host import field_of
from hf_slim.data import DataConfig, load_texts, reading_once
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.integration.saving import check_output, publish
from hf_slim.progress import progress
from hf_slim.vocabulary.rows import special_ids, trim_vocabulary_, used_tokens
from hf_slim.vocabulary.tokenizer import complete_kept, token_ids, trim_tokenizer_json

logger = logging.getLogger(__name__)
TRAINING, HELD_OUT = 0, 1  # the splits that `load_texts` returns
CHECKED_TEXTS = 64  # texts, spread over the data, that both tokenizers must split in the same way
CHECKED_BLOCKS, CHECKED_LENGTH = 4, 256  # how many of these texts, and how many tokens of each, both models run on
ROUNDING = 64  # units in the last place of the largest logit: the number of rows may change the order of sums


@dataclass(frozen=True)
class Reference:
    """Tokens and logits of some texts, from the original tokenizer and model."""

    model_class: type
    texts: list[str]
    tokens: list[list[str]]
    ids: list[Tensor]  # token ids that the model was run on
    logits: list[Tensor]  # of the kept tokens only, if the model has an output row for every token


@dataclass(frozen=True)
class Choice:
    """The tokens of a vocabulary that are kept.

    Attributes:
        spec: Content of the smaller `tokenizer.json`.
        new_ids: Old id -> new id.
        counts: Number of tokens in the text, and shares of them that are covered by kept tokens.
    """

    spec: dict[str, Any]
    new_ids: dict[int, int]
    counts: dict[str, float]


@reading_once()
def shrink_vocabulary(
    spec: str,
    data: DataConfig,
    output: Path,
    round_to: int = 64,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Saves a model and its tokenizer without the tokens that the data never uses: `hf-slim shrink-vocabulary`.

    The result is an ordinary checkpoint; `check_agreement` loads it before it is moved into place.

    Args:
        spec: A causal language model: a Hub id, a folder, or `package:<module>/<file>`.
        data: Tokens of both its training and its held-out text are kept.
        output: Folder for the smaller model and tokenizer.
        round_to: The number of rows is rounded up to a multiple of this.
        overwrite: Replace a finished model in the output folder, once the new one is complete.
        dtype: Dtype of the saved weights.
    Returns: rows, parameters and bytes before and after, shares of tokens covered, and the largest logit difference.
    Raises: SlimError: for every error that can be found before, or if the result does not agree with the original.
    """
    check_output(output, overwrite)
    tokenizer = load_tokenizer(spec)
    spec_of(tokenizer)
    load_texts(data)
    logger.info("Loading the model '%s'.", spec)
    model = load_model(spec, dtype)
    before = _sizes(model)
    smaller, check, counts = trim_(model, tokenizer, [data], round_to)
    report = {**counts, "before": before}
    logger.info("Saving the model to '%s' and comparing it with the original.", output)
    publish(model, smaller, output, lambda folder: report.update(largest_logit_difference=check(folder)))
    return report | {"after": _sizes(model)}


def as_text(report: dict[str, Any]) -> str:
    """The report of `shrink_vocabulary` as text: a table, and the result of the checks."""
    before, after = report["before"], report["after"]
    lines = [f"{'':<18} {'before':>12} {'after':>12} {'improvement':>12}"]
    for label, name, unit in (("rows", "rows", 1), ("parameters (M)", "parameters", 1e6), ("size (MB)", "bytes", 1e6)):
        numbers = [f"{side[name] / unit:>12,.{0 if unit == 1 else 1}f}" for side in (before, after)]
        lines.append(f"{label:<18} {' '.join(numbers)} {before[name] / after[name]:>11.2f}x")
    lines += [
        f"\n{report['tokens']:,} tokens of text, {report['covered']:.2%} covered. The tokens of the training text "
        f"alone would cover {report['held_out_covered_by_training']:.2%} of the held-out text.",
        f"Checked after reloading: same tokens, logits within {report['largest_logit_difference']:.1e}.",
    ]
    return "\n".join(lines)


def trim_(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datas: list[DataConfig], round_to: int
) -> tuple[PreTrainedTokenizerBase, Callable[[Path], float], dict[str, float]]:
    """Removes from the model the rows of the tokens that the data never uses.

    Args:
        datas: Sources of text; tokens of their training and held-out texts are kept.
    Returns: the smaller tokenizer; `check_agreement` for the folder that both are saved in; the counts of `Choice`.
    """
    choice = choose_kept(model, tokenizer, datas, round_to)
    reference = reference_of(model, tokenizer, datas, choice.new_ids)
    trim_vocabulary_(model, choice.new_ids)
    check = partial(check_agreement, reference=reference, spec=choice.spec, new_ids=choice.new_ids)
    return with_spec(tokenizer, choice.spec), check, choice.counts


def choose_kept(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datas: list[DataConfig], round_to: int
) -> Choice:
    """The tokens to keep: those of the texts, and those that model, tokenizer and chat template need."""
    whole_spec = spec_of(tokenizer)
    seen = count_tokens(tokenizer, datas, TRAINING, "tokenizing training text")
    unseen = count_tokens(tokenizer, datas, HELD_OUT, "tokenizing held-out text")
    required = special_ids(model) | chat_ids(tokenizer)
    spec, new_ids = trim_tokenizer_json(whole_spec, {*seen, *unseen, *required}, round_to)
    counts = {
        "tokens": seen.total() + unseen.total(),
        "covered": coverage(seen + unseen, new_ids),
        "held_out_covered_by_training": coverage(unseen, complete_kept(whole_spec, {*seen, *required})),
    }
    return Choice(spec, new_ids, counts)


def texts_of(datas: list[DataConfig], *splits: int) -> Iterator[str]:
    """The texts of all columns that are not empty, read one at a time.

    Args:
        datas: Sources of text; equal ones, as the stages of a recipe often have, are read once.
        splits: `TRAINING`, `HELD_OUT`, or both.
    """
    for split in splits:
        for data in {repr(data): data for data in datas}.values():
            rows = load_texts(data)[split]
            yield from (text for column in data.text_columns for text in rows[column] if text)


def spec_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of the tokenizer's `tokenizer.json`. Raises SlimError for a tokenizer without such a file."""
    backend = field_of(tokenizer, "backend_tokenizer")
    if backend is None:
        raise SlimError(
            f"{type(tokenizer).__name__} has no tokenizer.json, so it cannot be trimmed. Convert it to a fast "
            "tokenizer first."
        )
    return json.loads(backend.to_str())


def count_tokens(tokenizer: PreTrainedTokenizerBase, datas: list[DataConfig], split: int, title: str) -> Counter[int]:
    """How often each token occurs in the texts of a split, with a progress bar."""
    texts = progress(texts_of(datas, split), title, "text", total=sum(1 for _ in texts_of(datas, split)))
    return used_tokens(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)


def chat_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that the chat template adds to a conversation; empty if there is no template."""
    if not tokenizer.chat_template:
        return set()
    chat = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise any error for a conversation that it does not support
        logger.warning("The chat template failed, so its tokens are kept only if the data uses them: %s", error)
        return set()
    return set(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def coverage(counts: Counter[int], kept: Iterable[int]) -> float:
    """Share of the counted tokens that are kept, in [0, 1]."""
    return sum(counts[number] for number in kept) / max(counts.total(), 1)


def with_spec(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The same tokenizer (class, chat template, settings) with another tokenizer.json."""
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as folder:
        tokenizer.save_pretrained(folder)
        for name in tokenizer.vocab_files_names.values():
            (Path(folder) / name).unlink(missing_ok=True)  # files in older formats still have the full vocabulary
        (Path(folder) / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
        return AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def reference_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datas: list[DataConfig], new_ids: dict[int, int]
) -> Reference:
    """The tokens and logits of texts spread over the data, before trimming; logits only of the tokens in `new_ids`."""
    n_texts = sum(1 for _ in texts_of(datas, TRAINING, HELD_OUT))
    texts = list(islice(texts_of(datas, TRAINING, HELD_OUT), 0, None, max(n_texts // CHECKED_TEXTS, 1)))
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    ids = [torch.tensor([numbers[:CHECKED_LENGTH]]) for numbers in encoded if numbers][:CHECKED_BLOCKS]
    kept = torch.tensor(list(new_ids))
    logits = [model(input_ids=block).logits for block in ids]
    if model.get_output_embeddings() is not None:
        logits = [scores[..., kept] for scores in logits]
    tokens = [tokenizer.convert_ids_to_tokens(numbers) for numbers in encoded]
    return Reference(type(model), texts, tokens, ids, logits)


@torch.inference_mode()
def check_agreement(folder: Path, reference: Reference, spec: dict[str, Any], new_ids: dict[int, int]) -> float:
    """The largest difference between a logit of the saved, trimmed model and of the original.

    Raises: SlimError: if it is larger than rounding explains, or a text is split into other tokens than before.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(folder), reference.model_class.from_pretrained(folder).eval()
    if tokenizer.get_vocab() != token_ids(spec):
        raise SlimError(
            f"{type(tokenizer).__name__} adds or moves tokens when it loads, so this tokenizer cannot be trimmed. "
            'Save it with `"tokenizer_class": "TokenizersBackend"` in tokenizer_config.json, then again.'
        )
    for text, tokens in zip(reference.texts, reference.tokens, strict=True):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.convert_ids_to_tokens(ids) != tokens:
            raise SlimError(f"The trimmed tokenizer splits a text in another way. Please report it: {text[:200]!r}")
    largest = 0.0
    for block, before in zip(reference.ids, reference.logits, strict=True):
        after = model(input_ids=block.clone().apply_(new_ids.__getitem__)).logits
        difference = (after - before).abs().max().item()
        allowed = ROUNDING * torch.finfo(before.dtype).eps * before.abs().max().item()
        if not difference <= allowed:
            raise SlimError(
                f"Logits of the trimmed model differ by {difference}, and rounding explains only {allowed}. Please "
                "report it."
            )
        largest = max(largest, difference)
    return largest


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "rows": model.get_input_embeddings().num_embeddings,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    }
