import itertools

import pytest
import torch
from torch import nn

from hf_slim import PruningConfig, convert
from hf_slim.pruning.budget.plan import plan_removal
from hf_slim.pruning.budget.savings import layer_cost, savings_in_time, savings_of
from hf_slim.pruning.budget.selection import choose_removed
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.structure.find import find_group_sets
from hf_slim.pruning.transform import claim_for_pruning, mask_groups_
from tests.families import FAMILIES, random_groups

KINDS = {"ffn": 0.5, "kv_heads": 0.5, "channels": 0.5}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("measure", ["parameters", "macs"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "phi3", "t5", "qwen3_moe", "whisper", "resnet"])
def test_what_is_counted_as_saved_is_what_the_smaller_model_lacks(family, measure, seed):
    model = FAMILIES[family].build()
    before = layer_cost(model, measure)
    sets = [found for found in find_group_sets(model) if found.kind in KINDS]
    kinds = dict.fromkeys((found.kind for found in sets), 0.5)
    savings = savings_of(model, sets, measure)
    plan = claim_for_pruning(model, PruningConfig(kinds))
    removed = random_groups(plan.group_sets, seed)
    mask_groups_(model, plan.group_sets, removed)
    convert(model)
    assert savings.total == before
    assert savings.of(removed) == pytest.approx(before - layer_cost(model, measure), rel=1e-6)


def timings(**curves):
    found = [{"group_sets": [name], "kept": [8, 6, 4, 2], "ms": ms} for name, ms in curves.items()]
    return {"total_ms": sum(curve["ms"][0] for curve in found), "curves": found}


def test_time_is_interpolated_and_never_rises_when_groups_go():
    group_set = GroupSet("a", "ffn", 8, ())
    first = savings_in_time(timings(a=[8.0, 7.0, 7.5, 2.0]), [group_set]).first["a"]
    torch.testing.assert_close(first, torch.tensor([0, 0.5, 1, 1, 1, 3.5, 6, 6, 6], dtype=torch.float64))


def test_prices_are_those_of_the_concave_hull():
    for ms in itertools.product([8.0], [8.0, 7.0, 5.0], [6.0, 4.0, 3.0], [5.0, 2.0, 0.0]):
        savings = savings_in_time(timings(a=list(ms)), [GroupSet("a", "ffn", 8, ())])
        steps = savings.priced["a"].diff()
        assert (steps.diff() <= 1e-12).all()
        assert (savings.priced["a"] >= savings.first["a"] - 1e-12).all()


def test_a_step_that_saves_nothing_is_not_in_the_way_of_one_that_saves_much():
    group_sets = [GroupSet(name, "ffn", 8, ()) for name in ("plateau", "slope")]
    config = PruningConfig(target={"latency": 0.7}, uniform=False)
    measured = timings(plateau=[12.0, 12.0, 12.0, 2.0], slope=[8.0, 7.0, 6.0, 5.0])
    plan = plan_removal(nn.Module(), group_sets, config, measured)
    scores = {"plateau": torch.ones(8), "slope": torch.ones(8)}
    assert choose_removed(plan, scores, {}, config, 1.0) == {"plateau": [0, 1, 2, 3, 4, 5]}
