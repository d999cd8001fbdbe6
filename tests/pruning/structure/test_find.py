import pytest
import torch
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM, ResNetConfig, ResNetModel

from hf_slim import PruningConfig, SlimError
from hf_slim.pruning.groups import tensor_of
from hf_slim.pruning.structure.find import find_group_sets, understand
from hf_slim.pruning.transform import plan_pruning
from tests import tiny
from tests.families import FAMILIES


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 3), ("qwen3", 3), ("bert", 4), ("bert_mlm", 4)])
def test_every_layer_has_neurons_and_heads(family, kv_heads):
    model = tiny.FAMILIES[family]()
    found = find_group_sets(model)
    layers = model.config.num_hidden_layers
    assert [g.count for g in found if g.kind == "ffn"] == [64] * layers
    assert [g.count for g in found if g.kind == "kv_heads"] == [kv_heads] * layers


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_the_groups_of_a_layer_cover_it_exactly(family):
    model = tiny.FAMILIES[family]()
    for group_set in find_group_sets(model):
        if group_set.is_depth or group_set.balance:
            continue  # biases behind a layer, keys and values stay
        named = ((part, tensor_of(model, part.tensor)) for part in group_set.slices)
        tensors = {(id(tensor), part.dim): tensor for part, tensor in named}  # some lose rows and columns
        whole = sum(tensor.numel() for tensor in tensors.values())
        assert group_set.parameters_per_group(model) * group_set.count == whole


def test_a_norm_over_all_heads_is_refused():
    sizes = {name: value for name, value in tiny.LLAMA.items() if name != "head_dim"}
    model = Olmo2ForCausalLM(Olmo2Config(**sizes, pad_token_id=0))
    with pytest.raises(SlimError, match=r"layers\.0\.self_attn\.o_proj' was not understood.*norm over all heads"):
        plan_pruning(model, PruningConfig(sparsity={"kv_heads": 0.34}))


def test_layers_that_do_not_connect_are_named():
    model = tiny.llama()
    model.model.layers[0].mlp.down_proj = nn.Linear(60, 48)
    with pytest.raises(SlimError, match=r"layers\.0\.mlp\.down_proj. has 60 inputs and was given 64"):
        find_group_sets(model)


def test_random_numbers_of_the_user_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = tiny.llama()
    torch.manual_seed(5)
    find_group_sets(model)
    assert torch.equal(torch.rand(3), expected)


def test_channels_that_the_model_gives_back_stay():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    found, refusals = understand(model)
    assert sorted(group_set.count for group_set in found if group_set.kind == "channels") == [8, 8, 16]
    assert any("output of the model would lose channels" in refusal.reason for refusal in refusals)


def test_channels_under_a_norm_of_fixed_groups_are_refused_alone():
    found, refusals = understand(FAMILIES["wav2vec2"].build())
    assert [group_set.name for group_set in found if group_set.kind == "channels"] == [
        "wav2vec2.feature_extractor.conv_layers.2.conv/channels"
    ]
    assert any("divisible by num_groups" in refusal.reason for refusal in refusals)


def test_a_model_that_is_being_watched_is_understood():
    model, seen = tiny.llama(), []
    expected = find_group_sets(model)
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    assert find_group_sets(model) == expected
    assert not seen
