"""From a model and text to the same model without the vocabulary rows that the text never uses."""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError
from hf_slim.core.modules import field_of
from hf_slim.data import DataConfig, load_texts
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.integration.saving import check_output, publish
from hf_slim.progress import progress
from hf_slim.vocabulary.rows import special_ids, trim_vocabulary_, used_tokens
from hf_slim.vocabulary.tokenizer import complete_kept, token_ids, trim_tokenizer_json

logger = logging.getLogger(__name__)
CHECKED_TEXTS = 64  # spread over the data; each must come out with the same tokens
CHECKED_BLOCKS, CHECKED_LENGTH = 4, 256  # of these texts, through both models
ROUNDING = 64  # units in the last place of the largest logit: another number of rows may mean another order of sums


@dataclass(frozen=True)
class Reference:
    """What the untouched model and tokenizer make of some texts."""

    model_class: type
    texts: list[str]
    tokens: list[list[str]]
    ids: list[Tensor]  # for the model
    logits: list[Tensor]  # of kept tokens only, where they are of tokens at all


@dataclass(frozen=True)
class Choice:
    """Which tokens of a vocabulary stay.

    Attributes:
        spec: Content of the smaller `tokenizer.json`.
        new_ids: Old id -> new id.
        counts: Tokens of text, and shares of them that are covered.
    """

    spec: dict[str, Any]
    new_ids: dict[int, int]
    counts: dict[str, float]


def shrink_vocabulary(
    spec: str,
    data: DataConfig,
    output: Path,
    round_to: int = 64,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Saves a model and its tokenizer without the tokens that the data never uses: `hf-slim shrink-vocabulary`.

    What is saved is an ordinary checkpoint; `check_agreement` loads it before it is moved into place.

    Args:
        spec: A causal language model: a Hub id, a folder, or `package:<module>/<file>`.
        data: Training and held-out text both count as used.
        output: Folder for the smaller model and tokenizer.
        round_to: The number of rows grows to a multiple of this.
        overwrite: Replace a finished model in the output folder, once the new one is complete.
        dtype: Of the written weights.
    Returns: rows, parameters and bytes before and after, shares of tokens covered, and the largest difference found.
    Raises: SlimError: for anything that can be known before, or if the result does not agree with the original.
    """
    check_output(output, overwrite)
    tokenizer = load_tokenizer(spec)
    spec_of(tokenizer)
    texts = texts_of(data)
    model = load_model(spec, dtype)
    before = _sizes(model)
    smaller, check, counts = trim_(model, tokenizer, texts, round_to)
    report = {**counts, "before": before}
    publish(model, smaller, output, lambda folder: report.update(largest_logit_difference=check(folder)))
    return report | {"after": _sizes(model)}


def as_text(report: dict[str, Any]) -> str:
    """The report of `shrink_vocabulary` for people: a table and what was checked."""
    before, after = report["before"], report["after"]
    lines = [f"{'':<18} {'before':>12} {'after':>12} {'improvement':>12}"]
    for label, name, unit in (("rows", "rows", 1), ("parameters (M)", "parameters", 1e6), ("size (MB)", "bytes", 1e6)):
        numbers = [f"{side[name] / unit:>12,.{0 if unit == 1 else 1}f}" for side in (before, after)]
        lines.append(f"{label:<18} {' '.join(numbers)} {before[name] / after[name]:>11.2f}x")
    lines += [
        f"\n{report['tokens']:,} tokens of text, {report['covered']:.2%} covered. Of the held-out tokens, "
        f"{report['held_out_covered_by_training']:.2%} would be covered by those of the training text alone.",
        f"Checked after reloading: same tokens, logits within {report['largest_logit_difference']:.1e}.",
    ]
    return "\n".join(lines)


def trim_(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: tuple[list[str], list[str]], round_to: int
) -> tuple[PreTrainedTokenizerBase, Callable[[Path], float], dict[str, float]]:
    """Removes the rows of the tokens that the texts never use from the model.

    Args:
        texts: Training and held-out texts.
    Returns: the smaller tokenizer; `check_agreement` for the folder that both are saved in; the counts of `Choice`.
    """
    choice = choose_kept(model, tokenizer, texts, round_to)
    reference = reference_of(model, tokenizer, texts[0] + texts[1], choice.new_ids)
    trim_vocabulary_(model, choice.new_ids)
    check = partial(check_agreement, reference=reference, spec=choice.spec, new_ids=choice.new_ids)
    return with_spec(tokenizer, choice.spec), check, choice.counts


def choose_kept(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: tuple[list[str], list[str]], round_to: int
) -> Choice:
    """Which tokens stay: those of the texts, and what model, tokenizer and chat template need; changes nothing."""
    whole_spec = spec_of(tokenizer)
    seen = count_tokens(tokenizer, texts[0], "tokenizing training text")
    unseen = count_tokens(tokenizer, texts[1], "tokenizing held-out text")
    required = special_ids(model) | chat_ids(tokenizer)
    spec, new_ids = trim_tokenizer_json(whole_spec, {*seen, *unseen, *required}, round_to)
    counts = {
        "tokens": seen.total() + unseen.total(),
        "covered": coverage(seen + unseen, new_ids),
        "held_out_covered_by_training": coverage(unseen, complete_kept(whole_spec, {*seen, *required})),
    }
    return Choice(spec, new_ids, counts)


def texts_of(*datas: DataConfig) -> tuple[list[str], list[str]]:
    """Training and held-out texts, all columns of text one after the other."""
    texts: tuple[list[str], list[str]] = [], []
    for data in {repr(data): data for data in datas}.values():  # the stages of a recipe mostly read the same
        for part, split in zip(texts, load_texts(data), strict=True):
            part += [text for column in data.text_columns for text in split[column]]
    return texts


def spec_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of the tokenizer's `tokenizer.json`. Raises SlimError if it is of a kind that has none."""
    backend = field_of(tokenizer, "backend_tokenizer")
    if backend is None:
        raise SlimError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which is what is trimmed. Convert it first."
        )
    return json.loads(backend.to_str())


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], title: str) -> Counter[int]:
    """How often each token occurs in the texts, with a progress bar."""
    named = progress([text for text in texts if text], title, "text")
    return used_tokens(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in named)


def chat_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that a chat template adds to a conversation; none where there is no template."""
    if not tokenizer.chat_template:
        return set()
    chat = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template raises about a conversation it does not like
        logger.warning("The chat template could not be tried, so its words are not kept specially: %s", error)
        return set()
    return set(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def coverage(counts: Counter[int], kept: Iterable[int]) -> float:
    """Share of the counted tokens that are kept, in [0, 1]."""
    return sum(counts[number] for number in kept) / max(counts.total(), 1)


def with_spec(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The same tokenizer (class, chat template, settings) on another tokenizer.json."""
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as folder:
        tokenizer.save_pretrained(folder)
        for name in tokenizer.vocab_files_names.values():
            (Path(folder) / name).unlink(missing_ok=True)  # older forms of the vocabulary would contradict it
        (Path(folder) / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
        return AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def reference_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], new_ids: dict[int, int]
) -> Reference:
    """What the model says now about texts spread over the data; of logits of tokens only those in `new_ids`."""
    texts = [text for text in texts if text]
    texts = texts[:: max(len(texts) // CHECKED_TEXTS, 1)]
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
    """The largest difference of a logit between a saved, trimmed model and the original.

    Raises: SlimError: if it is more than rounding, or a text has other tokens than before.
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
            raise SlimError(f"The trimmed tokenizer cuts this text in another way, please report it: {text[:200]!r}")
    largest = 0.0
    for block, before in zip(reference.ids, reference.logits, strict=True):
        after = model(input_ids=block.clone().apply_(new_ids.__getitem__)).logits
        difference = (after - before).abs().max().item()
        allowed = ROUNDING * torch.finfo(before.dtype).eps * before.abs().max().item()
        if not difference <= allowed:
            raise SlimError(
                f"Logits of the trimmed model differ by {difference}, rounding explains {allowed}: report it."
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
