"""Fewer vocabulary rows: kept tokens keep their logits, ties, ids and biases."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_slim import QuantizationConfig, SlimError, prepare
from hf_slim.vocabulary.rows import special_ids, trim_vocabulary_, used_tokens
from tests import tiny

FAMILIES = {
    "llama": tiny.llama,
    "untied": tiny.qwen3,
    "bert_mlm": tiny.bert_mlm,
    "gpt2": tiny.gpt2,
    "t5": tiny.t5,
    "t5_untied": lambda seed: tiny.t5(seed, tie_word_embeddings=False),
}


def ids_from(kept: list[int]) -> torch.Tensor:
    return torch.tensor(kept)[torch.randint(len(kept), (3, 9), generator=torch.Generator().manual_seed(1))]


@torch.no_grad()
def logits(model, ids):
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, **more).logits


@settings(max_examples=18, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(FAMILIES)), st.integers(0, 10**6), st.sets(st.integers(0, 95), min_size=4))
def test_kept_tokens_keep_their_logits(family, seed, chosen):
    model = FAMILIES[family](seed)
    kept = sorted(chosen | special_ids(model))
    ids = ids_from(kept)
    before = logits(model, ids)[..., kept]
    new_ids = trim_vocabulary_(model, kept)
    assert list(new_ids) == kept
    assert list(new_ids.values()) == list(range(len(kept)))
    after = logits(model, ids.clone().apply_(new_ids.__getitem__))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert model.config.vocab_size == len(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smaller_model_is_an_ordinary_checkpoint_with_its_ties(family, tmp_path):
    model = FAMILIES[family](0)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    kept = sorted(special_ids(model) | set(range(5, 40)))
    trim_vocabulary_(model, kept)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    ids = ids_from(range(len(kept)))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


def test_ids_in_configs_follow_their_tokens():
    model = tiny.llama(pad_token_id=7, bos_token_id=20, eos_token_id=[30, 40])
    model.generation_config.suppress_tokens = [8, 30]
    model.generation_config.bad_words_ids = [[20, 30], [8]]
    trim_vocabulary_(model, [7, 20, 30, 40, 50])
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, [2, 3])
    assert model.generation_config.eos_token_id == [2, 3]
    assert model.generation_config.suppress_tokens == [2]
    assert model.generation_config.bad_words_ids == [[1, 2]]
    assert model.model.embed_tokens.padding_idx == 0
    assert model.vocab_size == model.lm_head.out_features == 5


def test_an_id_without_a_row_is_left_alone():
    model = tiny.gpt2()
    assert model.config.eos_token_id == 50256
    trim_vocabulary_(model, range(10))
    assert model.config.eos_token_id == 50256


def test_a_smaller_model_trains_and_generates():
    model = tiny.llama(pad_token_id=0, eos_token_id=90)
    trim_vocabulary_(model, [*range(20), *range(80, 96)])
    ids = ids_from(range(36))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.shape == (36, 48)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).max() < 36


@pytest.mark.parametrize(
    ("change", "kept", "says"),
    [
        ({}, [], "got none"),
        ({}, [1, 2, 96], "from 0 to 95"),
        ({}, [-1, 1, 2], "from 0 to 95"),
        ({"eos_token_id": 5}, [1, 2, 3], "lacks ids that the config names"),
    ],
)
def test_ids_that_cannot_be_are_refused_before_anything_changes(change, kept, says):
    model = tiny.llama(**change)
    with pytest.raises(SlimError, match=says):
        trim_vocabulary_(model, kept)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == 96


def test_models_without_a_plain_vocabulary_are_refused():
    with pytest.raises(SlimError, match="no vocabulary to trim"):
        trim_vocabulary_(tiny.vit(), [0, 1])
    with pytest.raises(SlimError, match="Trim"):
        trim_vocabulary_(prepare(tiny.llama(), QuantizationConfig("w8a8", embeddings="w8a8")), range(50))
    model = tiny.llama()
    model.generation_config.sequence_bias = [[[4], 1.0]]
    with pytest.raises(SlimError, match="sequence_bias"):
        trim_vocabulary_(model, range(50))


def test_positions_that_count_from_the_padding_token_are_refused():
    from transformers import RobertaConfig, RobertaForMaskedLM

    model = RobertaForMaskedLM(RobertaConfig(**(tiny.BERT | {"pad_token_id": 9})))
    with pytest.raises(SlimError, match="counts positions"):
        trim_vocabulary_(model, [0, 1, 2, 9, 50])
    model = RobertaForMaskedLM(RobertaConfig(**(tiny.BERT | {"pad_token_id": 1})))
    kept = [*range(10), 50, 60]
    ids = ids_from(kept)
    before = logits(model, ids)[..., kept]
    new_ids = trim_vocabulary_(model, kept)
    torch.testing.assert_close(logits(model, ids.clone().apply_(new_ids.__getitem__)), before, rtol=1e-5, atol=1e-5)


def test_counts_are_over_all_sequences():
    assert used_tokens([[1, 2, 2], [2, 5]]) == {1: 1, 2: 3, 5: 1}
