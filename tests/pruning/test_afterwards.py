"""What people do with a model still works once parts of it are gone."""

import pytest
import torch
from transformers import pipeline

from hf_slim.pruning.config import KINDS
from hf_slim.pruning.removal.cut import remove_groups_
from hf_slim.pruning.removal.masked_norms import mask_norms_
from hf_slim.pruning.structure.find import find_group_sets
from hf_slim.pruning.transform import mask_groups_
from tests import tiny
from tests.families import FAMILIES, inputs_for, output, random_groups

DECODERS = ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "mixtral", "qwen3_moe"]
SHORT = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def pruned(name, seed=0, kinds=None):
    """A model that has lost some of everything."""
    model = FAMILIES[name].build(seed)
    group_sets = [group_set for group_set in find_group_sets(model) if kinds is None or group_set.kind in kinds]
    removed = random_groups(group_sets, seed)
    mask_groups_(model, group_sets, removed)
    mask_norms_(model, group_sets, {})
    remove_groups_(model, group_sets, removed)
    return model


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_says_what_decoding_without_says(name, seed):
    model = pruned(name, seed)
    ids = tiny.tokens(rows=2, length=5, seed=seed).clamp(min=3)
    expected = model.generate(ids, use_cache=False, **SHORT)
    assert torch.equal(model.generate(ids, **SHORT), expected)
    assert model.generate(ids, num_beams=2, **SHORT).shape == expected.shape


@pytest.mark.parametrize("kinds", [("ffn", "hidden", "layers"), ("heads",)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_a_static_cache_works_where_key_value_heads_stay(name, kinds):
    model = pruned(name, kinds=kinds)
    ids = tiny.tokens(rows=2, length=5).clamp(min=3)
    assert torch.equal(model.generate(ids, cache_implementation="static", **SHORT), model.generate(ids, **SHORT))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders_generate(name):
    # transformers sizes the cache of T5 by its encoder's layers, also in a model that was never pruned
    kinds = {kind for kind in KINDS if kind != "layers"} if name == "t5" else None
    model = pruned(name, kinds=kinds)
    inputs = {key: value for key, value in inputs_for(model).items() if key in ("input_ids", "input_features")}
    settings = SHORT | {"decoder_start_token_id": 1}
    expected = model.generate(**inputs, use_cache=False, **settings)
    assert torch.equal(model.generate(**inputs, **settings), expected)
    assert len(model.generate(**inputs, num_beams=2, **settings)) == 1


def test_a_pipeline_runs():
    model = pruned("llama")
    say = pipeline("text-generation", model=model, tokenizer=tiny.tokenizer())
    assert say("abc", max_new_tokens=3)[0]["generated_text"].startswith("abc")


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "vit", "gpt2", "t5"])
def test_attention_implementations_agree(name):
    model = pruned(name)
    model.set_attn_implementation("sdpa")
    fused = output(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(output(model), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model = pruned(name)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        ids = tiny.tokens(rows=2)
        labels = ids if name != "bert" else torch.tensor([0, 1])
        model.config.use_cache = False
        model(input_ids=ids, labels=labels).loss.backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-7)
