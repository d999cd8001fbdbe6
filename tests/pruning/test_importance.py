import pytest
import torch

from hf_slim import SlimError
from hf_slim.pruning.groups import weight_blocks
from hf_slim.pruning.importance import CRITERIA, score_groups
from hf_slim.pruning.structure import find_group_sets
from tests import tiny


def with_gradients():
    model = tiny.llama()
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    return model


def product(layer):
    return (layer.weight.double() * layer.weight.grad.double()).abs().detach()


def test_taylor_is_the_papers_sum_over_the_group():
    model = with_gradients()
    scores = score_groups(model, find_group_sets(model), "taylor")
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    expected = product(mlp.gate_proj).sum(1) + product(mlp.up_proj).sum(1) + product(mlp.down_proj).sum(0)
    torch.testing.assert_close(scores["model.layers.1.mlp/ffn"].double(), expected, rtol=1e-5, atol=0)

    # key-value head 2 owns query heads 4 and 5, of 8 features each
    rows = {"q_proj": slice(32, 48), "k_proj": slice(16, 24), "v_proj": slice(16, 24)}
    head = sum(product(getattr(attention, name))[part].sum() for name, part in rows.items())
    head += product(attention.o_proj)[:, 32:48].sum()
    torch.testing.assert_close(scores["model.layers.1.self_attn/kv_heads"][2].double(), head, rtol=1e-5, atol=0)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_a_group_of_small_weights_matters_least(criterion):
    model = with_gradients()
    for weight, dim in ((model.model.layers[0].mlp.up_proj.weight, 0), (model.model.layers[0].mlp.gate_proj.weight, 0),
                        (model.model.layers[0].mlp.down_proj.weight, 1)):  # fmt: skip
        weight.data.select(dim, 7).mul_(1e-3)
    scores = score_groups(model, find_group_sets(model), criterion)
    assert scores["model.layers.0.mlp/ffn"].argmin() == 7


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_magnitudes_are_on_one_scale_across_layers(criterion):
    model = tiny.llama()
    model.model.layers[0].mlp.down_proj.weight.data.mul_(100)
    for score in score_groups(model, find_group_sets(model), criterion).values():
        torch.testing.assert_close(score.mean(), torch.tensor(1.0))


def test_a_frozen_layer_is_named():
    model = tiny.llama()
    model.model.layers[1].mlp.gate_proj.weight.requires_grad_(False)
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    with pytest.raises(SlimError, match=r"No gradient reached 'model\.layers\.1\.mlp\.gate_proj"):
        score_groups(model, find_group_sets(model), "taylor")


def test_magnitudes_are_the_norms_of_the_whole_group():
    model = tiny.llama()
    mlp = model.model.layers[1].mlp
    group = torch.cat([mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5]]).double().detach()
    blocks = weight_blocks(model, next(g for g in find_group_sets(model) if g.name == "model.layers.1.mlp/ffn"))
    torch.testing.assert_close(CRITERIA["l1"].score(blocks, [])[5].double(), group.norm(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(CRITERIA["l2"].score(blocks, [])[5].double(), group.norm(2), rtol=1e-5, atol=0)
