import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_slim import PruningCallback, PruningConfig, convert, prepare
from hf_slim.pruning.structure.find import find_group_sets
from tests import tiny

peft = pytest.importorskip("peft", reason="adapters are PEFT's: pip install peft")
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def with_lora(model):
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(model, settings)


def test_the_groups_are_those_of_the_model_without_adapters():
    found = find_group_sets(with_lora(tiny.llama()).get_base_model())
    assert [(g.kind, g.count) for g in found] == [(g.kind, g.count) for g in find_group_sets(tiny.llama())]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", ["ffn", "kv_heads", "hidden", "layers"])
def test_adapters_shrink_with_their_base(kind, uniform, tmp_path):
    model = with_lora(tiny.llama())
    prepare(model, PruningConfig({kind: 0.34}, uniform=uniform, criterion="l1"))
    masked = tiny.logits(model)
    small = convert(model)
    torch.testing.assert_close(tiny.logits(model), masked, rtol=1e-4, atol=2e-6)
    adapter = small.model.layers[0].mlp.up_proj
    neurons = adapter.base_layer.out_features
    assert (adapter.out_features, len(adapter.lora_B["default"].weight)) == (neurons, neurons)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), masked, rtol=1e-4, atol=2e-6)


def test_adapters_train_while_their_base_is_pruned(tmp_path):
    model = with_lora(tiny.llama())
    config = PruningConfig({"ffn": 0.5}, criterion="wanda", start=0.0)
    tiny.trainer(model, tmp_path, [PruningCallback(config)]).train()
    assert model.get_base_model().model.layers[0].mlp.down_proj.in_features == 32
    assert model.merge_and_unload().config.intermediate_size == 32
