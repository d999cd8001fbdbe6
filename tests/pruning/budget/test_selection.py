import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_slim import PruningCallback, PruningConfig, SlimError, convert, prepare
from hf_slim.pruning.budget.plan import expected_losses, plan_removal
from hf_slim.pruning.budget.savings import layer_cost
from hf_slim.pruning.budget.selection import choose_removed
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.transform import plan_pruning
from tests import tiny
from tests.families import FAMILIES


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
    assert sum(map(len, removed.values())) == sum(budget.amount for budget in plan.budgets)


def test_the_least_important_go_first_and_ties_go_to_the_lower_index():
    group_sets = sets([4, 4])
    scores = {"layer0/ffn": torch.tensor([3.0, 1.0, 1.0, 9.0]), "layer1/ffn": torch.tensor([1.0, 8.0, 8.0, 8.0])}
    config = PruningConfig(sparsity={"ffn": 0.25}, uniform=False)
    plan = plan_removal(nn.Module(), group_sets, config)
    assert choose_removed(plan, scores, {}, config, 1.0) == {"layer0/ffn": [1, 2]}


@pytest.mark.parametrize("uniform", [True, False])
def test_nothing_is_chosen_anew_before_another_step_is_due(uniform):
    group_sets, config = sets([64, 64]), PruningConfig({"ffn": 0.5}, uniform=uniform, start=0.0, round_to={"ffn": 16})
    plan = plan_removal(nn.Module(), group_sets, config)
    removed = choose_removed(plan, random_scores(group_sets), {}, config, 0.13)
    assert removed
    assert choose_removed(plan, {}, removed, config, 0.131) is removed  # without a look at the scores


def test_pinned_groups_stay_however_little_they_matter():
    group_set = GroupSet("layer/ffn", "ffn", 6, (), pinned=(0, 1))
    config = PruningConfig({"ffn": 0.9})
    plan = plan_removal(nn.Module(), [group_set], config)
    assert choose_removed(plan, {"layer/ffn": torch.arange(6.0)}, {}, config, 1.0) == {"layer/ffn": [2, 3, 4, 5]}


@pytest.mark.parametrize("amount", [{"sparsity": {"ffn": 0.5}}, {"target": {"parameters": 0.7}}])
@pytest.mark.parametrize("uniform", [True, False])
def test_what_is_expected_to_go_goes_on_average(amount, uniform):
    model = FAMILIES["llama"].build()
    config = PruningConfig(**amount, uniform=uniform)
    plan = plan_pruning(model, config)
    removed = choose_removed(plan, random_scores(plan.group_sets), {}, config, 1.0)
    expected = plan.savings.of({name: range(round(count)) for name, count in expected_losses(plan).items()})
    assert plan.savings.of(removed) == pytest.approx(expected, rel=0.1)


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


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("measure", ["parameters", "macs"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "vit"])
def test_a_target_is_met(family, measure, uniform):
    model = FAMILIES[family].build()
    before = layer_cost(model, measure)
    config = PruningConfig(target={measure: 0.7}, uniform=uniform, criterion="l1")
    convert(prepare(model, config))
    left = layer_cost(model, measure) / before
    assert 0.55 < left <= 0.7  # tiny layers are cut in large steps: a whole head, eight neurons of every expert


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_a_target_counts_what_channels_save_together_only_once(measure, uniform):
    model = FAMILIES["resnet"].build()
    before = layer_cost(model, measure)
    config = PruningConfig(target={measure: 0.5}, uniform=uniform, criterion="l1")
    convert(prepare(model, config))
    assert 0.3 < layer_cost(model, measure) / before <= 0.5


@pytest.mark.parametrize("kind", ["layers", "heads", "kv_heads"])
def test_a_target_is_spent_on_the_kinds_that_are_named(kind):
    model = FAMILIES["llama"].build(num_hidden_layers=4)
    before = layer_cost(model, "macs")
    convert(prepare(model, PruningConfig(target={"macs": 0.88}, spend_on=[kind], criterion="l1")))
    assert 0.6 < layer_cost(model, "macs") / before <= 0.88
    assert all(layer.mlp.up_proj.out_features == 64 for layer in model.model.layers)
    assert len(model.model.layers) == (3 if kind == "layers" else 4)


def test_a_target_spent_on_what_the_model_lacks_says_so():
    with pytest.raises(SlimError, match="no layer of this model has channels that can be removed"):
        plan_pruning(tiny.llama(), PruningConfig(target={"macs": 0.9}, spend_on=["channels"]))


def test_a_target_that_floors_forbid_says_how_much_can_go():
    with pytest.raises(SlimError, match=r"asks to remove 90% of the parameters, but at most \d+% can"):
        plan_pruning(tiny.llama(), PruningConfig(target={"parameters": 0.1}, floor=0.5))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("uniform", [True, False])
def test_what_is_left_is_a_multiple_and_above_the_floor(sparsity, uniform):
    config = PruningConfig({"ffn": sparsity}, uniform=uniform, criterion="l1", round_to={"ffn": 16}, floor=0.25)
    model = convert(prepare(tiny.llama(intermediate_size=72), config))
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert all(width % 16 == 0 and width >= 18 for width in widths)


def test_query_heads_go_evenly_from_every_key_value_head():
    model = tiny.llama(num_attention_heads=12, num_key_value_heads=3)
    convert(prepare(model, PruningConfig({"heads": 0.5}, criterion="l2")))
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.out_features == 6 * 8
        assert layer.self_attn.k_proj.out_features == 3 * 8
        assert layer.self_attn.num_key_value_groups == 2


def test_heads_of_a_model_without_groups_are_its_heads():
    model = convert(prepare(tiny.bert(), PruningConfig({"heads": 0.5}, criterion="l1")))
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 16


def test_ignored_layers_keep_all_their_groups():
    config = PruningConfig({"ffn": 0.5}, criterion="l1", ignore=["*.layers.0.*"])
    model = convert(prepare(tiny.llama(), config))
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [64, 32, 32]
    with pytest.raises(SlimError, match=r"`ignore` '\*\.7\.\*' matches none of the prunable layers, which are: model"):
        plan_pruning(tiny.llama(), PruningConfig({"ffn": 0.5}, ignore=["*.7.*"]))


def test_groups_come_back_only_when_they_may():
    group_sets = sets([4])
    for regrow, expected in ((True, [2, 3]), (False, [0, 1])):
        config = PruningConfig({"ffn": 0.5}, regrow=regrow, start=0.0, stop=0.5)
        plan = plan_removal(nn.Module(), group_sets, config)
        removed = choose_removed(plan, {"layer0/ffn": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {}, config, 0.6)
        assert removed == {"layer0/ffn": [0, 1]}
        removed = choose_removed(plan, {"layer0/ffn": torch.tensor([4.0, 3.0, 2.0, 1.0])}, removed, config, 0.7)
        assert removed == {"layer0/ffn": expected}


def test_nothing_comes_back_once_training_is_over():
    """The last choice is about what is missing: what was trained without a group cannot do with it."""
    config = PruningConfig({"ffn": 0.5}, regrow=True, start=0.0, stop=0.5)
    plan = plan_removal(nn.Module(), sets([4]), config)
    removed = {"layer0/ffn": [0, 1]}
    assert choose_removed(plan, {"layer0/ffn": torch.tensor([4.0, 3.0, 2.0, 1.0])}, removed, config, 1.0) is removed


def test_a_run_that_may_regrow_ends_with_the_target_removed(tmp_path):
    config = PruningConfig({"ffn": 0.5}, regrow=True, start=0.0, stop=0.6, every=2)
    trainer = tiny.trainer(tiny.llama(), tmp_path, [PruningCallback(config)])
    trainer.train()
    assert [layer.mlp.up_proj.out_features for layer in trainer.model.model.layers] == [32, 32, 32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": {"ffn": 0.5}, "target": {"macs": 0.5}}, "Set only one of them"),
        ({"target": {"bytes": 0.5}}, "must name one of parameters, macs"),
        ({"target": {"macs": 0}}, "would keep nothing"),
        ({"sparsity": {"neurons": 0.5}}, "has no kind 'neurons'"),
        ({"target": {"macs": 0.5}, "spend_on": ["neurons"]}, "`spend_on` has no kind 'neurons'"),
        ({"target": {"macs": 0.5}, "spend_on": ["ffn", "layers"]}, "layers and ffn, which overlap"),
        ({"round_to": {"ffn": 0}}, "`round_to.ffn` must be a whole number of at least 1"),
        ({"schedule": "staged", "rounds": 1}, "`rounds` must be a whole number of at least 2"),
        ({"every": 0}, "`every` must be a whole number of at least 1"),
        ({"floor": 1.0}, "`floor` must be in"),
        ({"calibration_batches": -1}, "must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(settings, message):
    with pytest.raises(SlimError, match=message):
        PruningConfig(**settings)
