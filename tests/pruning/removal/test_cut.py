import pytest
import torch

from hf_slim import PruningConfig, QuantizationConfig, SlimError, convert, prepare
from hf_slim.core.record import state_of
from hf_slim.pruning.removal.cut import remove_groups_
from hf_slim.pruning.removal.masked_norms import mask_norms_
from hf_slim.pruning.state import PruningState
from hf_slim.pruning.structure.find import find_group_sets
from tests import tiny

BOTH = PruningConfig(sparsity={"ffn": 0.4, "kv_heads": 0.34}, uniform=False, criterion="l2")


@pytest.mark.parametrize("scheme", [("w8a8", None), ("w4a16", 16), ("w4a16", None)])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_removal_under_fake_quantization_leaves_the_logits(family, scheme):
    # float64: in float32 the order of a sum may flip the code of an activation, which is a whole step
    model = tiny.FAMILIES[family]().double()
    prepare(model, BOTH, QuantizationConfig(scheme[0], group_size=scheme[1]))
    masked = tiny.logits(model)
    remove_groups_(model, find_group_sets(model), state_of(model, PruningState).removed)
    torch.testing.assert_close(tiny.logits(model), masked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["ffn", "hidden"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
def test_groups_on_a_grid_form_among_the_columns_that_stay(family, kind):
    model = tiny.ALL_FAMILIES[family]()
    model = model if family == "mixtral" else model.double()  # grouped products of experts know no float64
    grid = QuantizationConfig("w4a16", group_size=16, embeddings="w4a16-g16")
    prepare(model, PruningConfig({kind: 0.4}, uniform=False, criterion="l1"), grid)
    masked = tiny.output(model)
    state = state_of(model, PruningState)
    mask_norms_(model, state.plan.group_sets, {})
    remove_groups_(model, state.plan.group_sets, state.removed)
    torch.testing.assert_close(tiny.output(model), masked, rtol=1e-5, atol=1e-6)


def test_matrices_are_really_smaller():
    model = convert(prepare(tiny.llama(), PruningConfig(sparsity={"ffn": 0.25}, criterion="l1")))
    mlp = model.model.layers[0].mlp
    assert mlp.up_proj.weight.shape == (48, 48)
    assert mlp.down_proj.weight.shape == (48, 48)
    assert mlp.down_proj.in_features == 48


def test_generation_goes_on_with_fewer_heads():
    model = tiny.llama()
    model.generation_config.pad_token_id = 0
    ids = tiny.tokens(2)
    prepare(model, BOTH)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    masked = model.generate(ids, **arguments)
    smaller = convert(model)
    assert torch.equal(smaller.generate(ids, **arguments), masked)
    assert smaller.generate(ids, num_beams=2, **arguments).shape == masked.shape


def test_groups_that_came_back_to_life_are_not_removed_silently():
    model = prepare(tiny.llama(), BOTH)
    model.model.layers[0].mlp.up_proj.weight.data.add_(1)
    with pytest.raises(SlimError, match="call `zero_groups_`"):
        convert(model)


def test_one_shot_by_gradient_needs_gradients():
    model = tiny.llama()
    with pytest.raises(SlimError, match=r"loss\.backward"):
        prepare(model, PruningConfig())
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert convert(prepare(model, PruningConfig())).model.layers[0].mlp.up_proj.out_features == 32
