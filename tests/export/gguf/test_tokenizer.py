"""Tokenizers as metadata: what llama.cpp is told about tokens, merges and cuts, and what it cannot do."""

import pytest
from tokenizers import normalizers, pre_tokenizers

from hf_slim import SlimError
from hf_slim.export.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    tokenizer_metadata,
)
from tests import tiny
from tests.export import models

ROWS = models.VOCAB_SIZE


def told(tokenizer, key: str, rows: int = ROWS):
    return tokenizer_metadata(tokenizer, rows)[f"tokenizer.ggml.{key}"]


def test_every_row_of_the_model_is_a_token_of_its_type():
    tokenizer = models.byte_level()
    tokenizer.add_tokens(["<think>"])
    tokens, types = told(tokenizer, "tokens"), told(tokenizer, "token_type")
    assert len(tokens) == len(types) == ROWS
    assert all(tokens[number] == token for token, number in tokenizer.get_vocab().items())
    assert {types[tokenizer.convert_tokens_to_ids(name)] for name in ("<s>", "</s>", "<pad>")} == {CONTROL}
    assert types[tokenizer.convert_tokens_to_ids("<think>")] == USER_DEFINED
    assert types[tokenizer.convert_tokens_to_ids("Ġthe")] == NORMAL
    assert (tokens[-1], types[-1]) == (f"[PAD{ROWS - 1}]", UNUSED)
    assert told(tokenizer, "merges")[:3] == ["t h", "th e", "Ġ the"]
    assert told(tokenizer, "eos_token_id") == tokenizer.eos_token_id


@pytest.mark.parametrize("split", [cuts[0] for cuts in SPLITS if len(cuts) == 1 and cuts != ("gpt2",)])
def test_a_cut_by_a_regular_expression_is_known_by_it(split):
    tokenizer = models.byte_level(split)
    merged, whole = SPLITS[(split,)]
    for name, ignores in ((merged, False), (whole, True)):
        tokenizer.backend_tokenizer.model.ignore_merges = ignores
        if name:
            assert told(tokenizer, "pre") == name
        else:
            with pytest.raises(SlimError, match="no counterpart"):
                told(tokenizer, "pre")


def test_digits_before_the_cuts_of_gpt2_are_those_of_smollm():
    tokenizer = models.byte_level()
    assert told(tokenizer, "pre") == "gpt-2"
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert told(tokenizer, "pre") == "smollm"


@pytest.mark.parametrize("prepend", [True, False])
def test_scores_of_sentencepiece_order_tokens_as_its_merges_do(prepend):
    tokenizer = models.sentencepiece(prepend)
    vocabulary, scores, types = tokenizer.get_vocab(), told(tokenizer, "scores"), told(tokenizer, "token_type")
    made = [scores[vocabulary[token]] for token in ("th", "the", "▁the", "in", "on", "at", "▁a")]
    assert made == sorted(made, reverse=True)
    assert len(set(made)) == len(made)
    assert types[vocabulary["<0x0A>"]] == BYTE
    assert types[vocabulary["<unk>"]] == UNKNOWN
    assert types[vocabulary["<s>"]] == CONTROL
    assert told(tokenizer, "add_space_prefix") == prepend


def test_word_pieces_are_written_with_a_mark_where_words_start():
    tokens = told(models.word_pieces(), "tokens")
    assert tokens[:12] == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "▁the",
        "▁sat",
        "s",
        "▁cat",
        "er",
        "▁.",
        "▁mat",
    ]
    metadata = tokenizer_metadata(models.word_pieces(), ROWS)
    assert metadata["tokenizer.ggml.bos_token_id"] == 2  # the token for a class
    assert metadata["tokenizer.ggml.seperator_token_id"] == 3
    assert (metadata["tokenizer.ggml.add_sep_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, False)


def test_what_surrounds_a_text_is_found_by_trying():
    tokenizer = models.byte_level()
    assert (told(tokenizer, "add_bos_token"), told(tokenizer, "add_eos_token")) == (False, False)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert (told(tokenizer, "add_bos_token"), told(tokenizer, "add_eos_token")) == (True, False)


def test_a_chat_template_is_kept():
    tokenizer = models.byte_level()
    assert "tokenizer.chat_template" not in tokenizer_metadata(tokenizer, ROWS)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer_metadata(tokenizer, ROWS)["tokenizer.chat_template"] == tokenizer.chat_template


def with_normalizer():
    tokenizer = models.byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (tiny.tokenizer, "WordLevel"),
        (lambda: models.byte_level("[a-z]+"), "no counterpart"),
        (lambda: models.word_pieces(lowercase=False), "capitals"),
        (with_normalizer, "Lowercase"),
        (lambda: None, "NoneType"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer, reason):
    with pytest.raises(SlimError, match=reason):
        tokenizer_metadata(tokenizer(), ROWS)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(SlimError, match="200 rows"):
        tokenizer_metadata(models.byte_level(), 200)
