"""A tokenizer with fewer tokens writes the text it was cut for exactly as before."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hf_slim import SlimError
from hf_slim.vocabulary.rows import used_tokens
from hf_slim.vocabulary.tokenizer import complete_kept, token_ids, trim_tokenizer_json

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
SYLLABLES = ["ba", "na", "ko", "ri", "tu", "é", "ß", "0", "1", "the", "ing", "=="]


def corpus(seed: int, size: int, words: int = 60) -> list[str]:
    """Texts over one language of made-up words: the same letters, so that what is trimmed is not trivially foreign."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(words)]
    return [" ".join(rng.choices(lexicon, k=rng.randint(1, 12))) for _ in range(size)]


def byte_level(texts: list[str], **arguments: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**arguments))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_fallback(texts: list[str]) -> Tokenizer:
    """As Llama 2: characters and bytes, and every way to build a token is a merge."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    tokens = [*SPECIAL, *(f"<0x{number:02X}>" for number in range(256)), *pieces]
    ids = {token: number for number, token in enumerate(tokens)}
    merges = [(t[:at], t[at:]) for t in pieces for at in range(1, len(t)) if t[:at] in ids and t[at:] in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def suffixed(texts: list[str]) -> Tokenizer:
    """As CLIP: characters, the last one of a word marked."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=140, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wordpiece(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wordlevel(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return tokenizer


def unigram(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "ignore_merges": lambda texts: byte_level(texts, ignore_merges=True),
    "byte_fallback": byte_fallback,
    "suffixed": suffixed,
    "wordpiece": wordpiece,
    "wordlevel": wordlevel,
    "unigram": unigram,
}
TRAINED: dict[str, Tokenizer] = {}


def trained(kind: str) -> Tokenizer:
    """One tokenizer of each kind for all tests, trained once, with an added token of its own."""
    if kind not in TRAINED:
        tokenizer = KINDS[kind](corpus(0, 200))
        tokenizer.add_tokens([AddedToken("[mark]", normalized=False)])
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        template = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", ids)
        tokenizer.post_processor = processors.Sequence([template])
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")
        TRAINED[kind] = tokenizer
    return TRAINED[kind]


def trim(tokenizer: Tokenizer, texts: list[str], **arguments: object) -> tuple[Tokenizer, dict[int, int]]:
    counts = used_tokens(tokenizer.encode(text).ids for text in texts)
    spec, new_ids = trim_tokenizer_json(json.loads(tokenizer.to_str()), counts, **arguments)
    return Tokenizer.from_str(json.dumps(spec)), new_ids


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(KINDS)), st.integers(0, 10**6), st.integers(1, 6), st.booleans())
def test_every_text_of_the_corpus_keeps_its_tokens(kind, seed, size, foreign):
    tokenizer = trained(kind)
    texts = corpus(seed, size, words=5)
    if foreign:  # characters that no tokenizer here was trained on, and its own added token
        texts += [f"{texts[0]} ☃日{text}x [mark]" for text in texts]
    smaller, new_ids = trim(tokenizer, texts)
    for text in texts:
        before, after = tokenizer.encode(text), smaller.encode(text)
        assert after.tokens == before.tokens
        assert after.ids == [new_ids[number] for number in before.ids]
    assert smaller.get_vocab_size() == len(new_ids) <= tokenizer.get_vocab_size()
    assert smaller.decode(smaller.encode(texts[0]).ids) == tokenizer.decode(tokenizer.encode(texts[0]).ids)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(KINDS)), st.integers(0, 10**6))
def test_so_does_any_other_text_that_has_only_kept_tokens(kind, seed):
    tokenizer = trained(kind)
    smaller, new_ids = trim(tokenizer, corpus(seed, 3, words=6))
    for text in corpus(0, 60) + corpus(seed + 1, 20, words=4):
        for word in (text, *text.split()):
            before = tokenizer.encode(word)
            if set(before.ids) <= set(new_ids):
                assert smaller.encode(word).tokens == before.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_corpus_needs_few_tokens_and_leaves_the_spec_alone(kind):
    tokenizer = trained(kind)
    spec = json.loads(tokenizer.to_str())
    smaller, new_ids = trim_tokenizer_json(spec, [])
    assert spec == json.loads(tokenizer.to_str())
    assert len(new_ids) < tokenizer.get_vocab_size()
    assert sorted(token_ids(smaller).values()) == list(range(len(new_ids)))
    assert all(token in token_ids(smaller) for token in [*SPECIAL, "[mark]"])
    assert trim_tokenizer_json(smaller, [])[0] == smaller


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wordlevel"])
def test_text_never_seen_is_spelt_in_characters_or_bytes(kind):
    tokenizer = trained(kind)
    smaller, _ = trim(tokenizer, ["banana"])
    assert "<unk>" not in smaller.encode("tukori the").tokens
    if kind in ("byte_level", "byte_fallback"):
        assert "<unk>" not in smaller.encode("日本 naïve").tokens
    if kind == "byte_level":
        assert smaller.decode(smaller.encode("tukori ☃").ids, skip_special_tokens=True) == "tukori ☃"


def test_an_unknown_character_costs_unigram_what_it_did():
    scores = {"<unk>": 0.0, "a": -50.0, "c": -1.0, "ab": -1.0, "b☃": -50.0, "zz": -100.0}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    smaller, _ = trim(tokenizer, ["abc", "ab☃c"])
    for each in (tokenizer, smaller):  # an unknown ☃ costs 110, ten more than "zz", which no text here has
        assert each.encode("ab☃c").tokens == ["a", "b☃", "c"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("round_to", [8, 64])
def test_the_number_of_tokens_is_rounded_up(kind, round_to):
    spec = json.loads(trained(kind).to_str())
    exact = complete_kept(spec, [])
    rounded = complete_kept(spec, [], round_to)
    assert set(exact) <= set(rounded)
    assert len(rounded) == min(-(-len(exact) // round_to) * round_to, len(token_ids(spec)))
    assert complete_kept(spec, rounded) == rounded  # what filled up came with its parts
    spare = [number for number in token_ids(spec).values() if number not in exact][-1]
    if len(exact) % round_to and kind in ("wordpiece", "wordlevel", "unigram"):
        assert spare in complete_kept(spec, [], round_to, spare=[spare])


@pytest.mark.parametrize("type_", ["BertProcessing", "RobertaProcessing"])
def test_ids_follow_in_post_processor_and_padding(type_):
    spec = json.loads(trained("wordlevel").to_str())
    ids = token_ids(spec)
    last = max(ids, key=ids.get)
    spec["padding"]["pad_id"] = ids[last]
    spec["post_processor"] = {"type": type_, "sep": [last, ids[last]], "cls": ["<s>", ids["<s>"]]}
    trimmed, new_ids = trim_tokenizer_json(spec, [])
    assert trimmed["padding"]["pad_id"] == new_ids[ids[last]] == token_ids(trimmed)[last]
    assert trimmed["post_processor"]["sep"] == [last, new_ids[ids[last]]]


def test_merges_written_as_text_stay_text():
    spec = json.loads(trained("byte_level").to_str())
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    ids = trained("byte_level").encode("banana the").ids
    trimmed, _ = trim_tokenizer_json(spec, ids)
    assert trimmed["model"]["merges"]
    assert (
        Tokenizer.from_str(json.dumps(trimmed)).encode("banana the").tokens
        == trained("byte_level").encode("banana the").tokens
    )


def test_what_cannot_be_is_refused():
    spec = json.loads(trained("wordlevel").to_str())
    with pytest.raises(SlimError, match="does not have"):
        trim_tokenizer_json(spec, [10**6])
    with pytest.raises(SlimError, match="`round_to`"):
        trim_tokenizer_json(spec, [], round_to=0)
    for model in ({"type": "Quantum"}, {"vocab": {}}):
        with pytest.raises(SlimError, match="Known are BPE, WordPiece"):
            trim_tokenizer_json(spec | {"model": model}, [])
