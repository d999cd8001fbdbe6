import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_slim import PruningConfig, SlimError
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.selection import choose_removed, plan_removal
from hf_slim.pruning.transform import plan_pruning
from tests import tiny


def sets(counts, kind="ffn"):
    return [GroupSet(f"layer{i}/{kind}", kind, count, ()) for i, count in enumerate(counts)]


def random_scores(group_sets, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {group_set.name: torch.rand(group_set.count, generator=generator) for group_set in group_sets}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.floats(0.05, 0.95), st.booleans(), st.integers(0, 999))
def test_removal_grows_to_the_target_and_never_goes_back(counts, sparsity, uniform, seed):
    group_sets, config = sets(counts), PruningConfig(sparsity={"ffn": sparsity}, uniform=uniform, start=0.0)
    try:
        plan = plan_removal(nn.Module(), group_sets, config)
    except SlimError as error:
        assert "removes nothing" in str(error)  # noqa: PT017  one of the two outcomes that are allowed
        return
    removed = {}
    for step in range(1, 11):
        scores = random_scores(group_sets, seed + step)
        grown = choose_removed(plan, scores, removed, config, step / 10)
        assert all(set(removed[name]) <= set(grown[name]) for name in removed)
        assert all(len(grown.get(group_set.name, [])) < group_set.count for group_set in group_sets)
        removed = grown
    assert sum(map(len, removed.values())) == sum(quota for _, quota in plan.quotas)


def test_the_least_important_go_first_and_ties_go_to_the_lower_index():
    group_sets = sets([4, 4])
    scores = {"layer0/ffn": torch.tensor([3.0, 1.0, 1.0, 9.0]), "layer1/ffn": torch.tensor([1.0, 8.0, 8.0, 8.0])}
    config = PruningConfig(sparsity={"ffn": 0.25}, uniform=False)
    plan = plan_removal(nn.Module(), group_sets, config)
    assert choose_removed(plan, scores, {}, config, 1.0) == {"layer0/ffn": [1, 2]}


def test_a_uniform_kind_takes_the_same_number_from_every_layer():
    group_sets = sets([8, 8, 8])
    config = PruningConfig(sparsity={"ffn": 0.5})
    removed = choose_removed(plan_removal(nn.Module(), group_sets, config), random_scores(group_sets), {}, config, 1.0)
    assert [len(indices) for indices in removed.values()] == [4, 4, 4]


def test_a_share_too_small_for_one_group_names_the_cure():
    with pytest.raises(SlimError, match=r"kv_heads` 0.1 removes nothing.*uniform: \{kv_heads: false\}"):
        plan_pruning(tiny.llama(), PruningConfig(sparsity={"kv_heads": 0.1}))


def test_a_model_without_the_structure_is_refused():
    with pytest.raises(SlimError, match="no layer of this model was recognised as ffn"):
        plan_removal(nn.Module(), [], PruningConfig())
