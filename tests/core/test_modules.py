import torch

from hf_slim import QuantizationConfig, prepare
from hf_slim.core.modules import plain_copy, resolve, tied_modules
from tests import tiny


def test_tied_modules_are_found_under_their_later_name():
    assert tied_modules(tiny.llama()) == {"lm_head": "model.embed_tokens"}
    assert tied_modules(tiny.llama(tie_word_embeddings=False)) == {}


def test_a_plain_copy_of_a_prepared_model_is_the_model_before():
    model = tiny.llama()
    before = tiny.logits(model)
    prepare(model, QuantizationConfig(scheme="w4a8", embeddings="w4a16"))
    assert not torch.equal(tiny.logits(model), before)
    assert torch.equal(tiny.logits(plain_copy(model)), before)


def test_a_plain_copy_shares_no_memory():
    model = tiny.llama()
    twin = plain_copy(model)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}


def test_a_path_resolves_with_and_without_the_base_prefix():
    model = tiny.llama()
    assert resolve(model, "model.layers.0.mlp") == "model.layers.0.mlp"
    assert resolve(model.model, "model.layers.0.mlp") == "layers.0.mlp"
    assert resolve(model, "layers.0.mlp") == "model.layers.0.mlp"
    assert resolve(model.model, "lm_head") is None
