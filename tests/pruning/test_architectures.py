import pytest
import torch
from torch import nn

from hf_slim import SlimError
from hf_slim.pruning.architectures import find_group_sets
from tests import tiny


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
        whole = 0
        for part in group_set.slices:
            layer = model.get_submodule(part.module)
            whole += layer.weight.numel()
            whole += layer.bias.numel() if part.dim == 0 and layer.bias is not None else 0
        assert group_set.parameters_per_group(model) * group_set.count == whole


def test_a_norm_over_all_heads_is_refused():
    model = tiny.qwen3()
    model.model.layers[0].self_attn.q_norm.weight = nn.Parameter(torch.ones(48))
    with pytest.raises(SlimError, match="normalises over all heads"):
        find_group_sets(model)


def test_layers_that_do_not_connect_are_named():
    model = tiny.llama()
    model.model.layers[0].mlp.down_proj = nn.Linear(60, 48)
    with pytest.raises(SlimError, match=r"layers\.0\.mlp.*do not connect"):
        find_group_sets(model)
