import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_slim.distillation.capture.output_layer import Split, capture_head, output_layer, split_of
from tests import tiny


def gemma2(**changes: object) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Gemma2ForCausalLM(
        Gemma2Config(**(sizes | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96} | changes))
    )


@pytest.mark.parametrize(
    ("family", "shifted"),
    [("llama", True), ("qwen3", True), ("gpt2", True), ("mixtral", True), ("bert_mlm", False), ("t5", False)],
)
def test_the_probe_finds_the_head_and_which_label_a_position_predicts(family, shifted):
    assert split_of(tiny.ALL_FAMILIES[family]()) == Split(tiny.VOCAB_SIZE, shifted)


def test_the_head_of_a_model_with_capped_logits_or_further_losses_is_not_separated():
    assert split_of(gemma2(final_logit_softcapping=30.0)) is None
    assert split_of(gemma2(final_logit_softcapping=None)) == Split(96, True)
    assert split_of(tiny.mixtral(output_router_logits=True, router_aux_loss_coef=1.0)) is None


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_classifiers_have_no_output_layer_to_separate(family):
    assert split_of(tiny.ALL_FAMILIES[family]()) is None


def test_the_probe_changes_neither_mode_nor_random_numbers():
    model = tiny.llama().train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    split_of(model)
    assert torch.equal(torch.rand(2), expected)
    assert all(module.training for module in model.modules())


def test_a_tap_keeps_what_enters_and_lets_one_position_through():
    model = tiny.llama()
    whole = tiny.logits(model)
    with capture_head(model) as capture:
        narrow = tiny.logits(model)
    assert narrow.shape[1] == 1
    assert torch.equal(output_layer(model)(capture.states), whole)
    assert torch.equal(tiny.logits(model), whole)
