import pytest
import torch
from torch import nn

from hf_slim import QuantizationConfig, prepare
from hf_slim.core.modules import evaluating, plain_copy, resolve, temporary_hooks, temporary_module, tied_modules
from hf_slim.distillation.capture.output_layer import capture_head
from hf_slim.quantization.layers.scale_holders import quantizers, rounding_disabled
from tests import tiny
from tests.states import Broken, check_and_break, in_mixed_modes, raise_broken, rounded, state_of


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


def test_what_lasts_for_a_while_ends_with_an_error():
    model = in_mixed_modes(rounded())
    before = state_of(model)
    layer = model.model.layers[0].mlp.up_proj
    contexts = {
        "evaluating": lambda: evaluating(model),
        "temporary hooks": lambda: temporary_hooks([layer.register_forward_hook(raise_broken)]),
        "temporary module": lambda: temporary_module(model, "model.layers.1.mlp", nn.Identity()),
        "rounding disabled": lambda: rounding_disabled(quantizers(model)),
        "head capture": lambda: capture_head(model),
    }
    for name, context in contexts.items():
        with pytest.raises(Broken), context():
            check_and_break(state_of(model) != before)
        assert state_of(model) == before, name


def test_hooks_before_one_that_cannot_be_registered_are_removed():
    model = tiny.llama()

    def handles():
        yield model.lm_head.register_forward_hook(raise_broken)
        raise Broken

    with pytest.raises(Broken), temporary_hooks(handles()):
        pass
    assert not model.lm_head._forward_hooks
