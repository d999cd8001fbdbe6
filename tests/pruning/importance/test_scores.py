import pytest
import torch

from hf_slim import PruningConfig, SlimError
from hf_slim.pruning.importance.criteria import CRITERIA, place_sums
from hf_slim.pruning.importance.scores import observed, score_groups
from hf_slim.pruning.importance.statistics import readers
from hf_slim.pruning.structure.find import find_group_sets
from tests import tiny

FFN = "model.layers.1.mlp/ffn"


def with_gradients():
    model = tiny.llama()
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    return model


def scores_of(model, criterion):
    group_sets = [group_set for group_set in find_group_sets(model) if not group_set.is_depth]
    with observed(model, group_sets, PruningConfig(criterion=criterion).criterion_by_kind) as seen:
        tiny.logits(model)
    return score_groups(model, group_sets, criterion, seen[criterion])


def neuron(model, index, of=lambda weight: weight):
    """Everything that belongs to one neuron of layer 1, in float64."""
    mlp = model.model.layers[1].mlp
    gate, up, down = (of(layer.weight).detach().double() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return torch.cat([gate[index], up[index], down[:, index]])


def inputs_of(model):
    """What the consumer of layer 1 reads: `(tokens, neurons)`, in float64."""
    seen = []
    layer = model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, -2).double()))
    tiny.logits(model)
    hook.remove()
    return seen[0]


def test_taylor_is_the_papers_sum_over_the_group():
    model = with_gradients()
    scores = scores_of(model, "taylor")
    products = neuron(model, 5) * neuron(model, 5, lambda weight: weight.grad)
    torch.testing.assert_close(scores[FFN][5].double(), products.abs().sum(), rtol=1e-5, atol=0)

    # key-value head 2 owns query heads 4 and 5, of 8 features each
    attention = model.model.layers[1].self_attn
    rows = {"q_proj": slice(32, 48), "k_proj": slice(16, 24), "v_proj": slice(16, 24)}
    head = sum(product(getattr(attention, name))[part].sum() for name, part in rows.items())
    head += product(attention.o_proj)[:, 32:48].sum()
    torch.testing.assert_close(scores["model.layers.1.self_attn/kv_heads"][2].double(), head, rtol=1e-5, atol=0)


def product(layer):
    return (layer.weight.double() * layer.weight.grad.double()).abs().detach()


@pytest.mark.parametrize(
    ("criterion", "formula"),
    [
        ("taylor_sum", lambda weight, gradient: (weight * gradient).sum().abs()),
        ("fisher", lambda weight, gradient: ((weight * gradient) ** 2).sum() / 2),
        ("movement", lambda weight, gradient: -(weight * gradient).sum()),
    ],
)
def test_criteria_of_gradients_are_their_formulas(criterion, formula):
    model = with_gradients()
    expected = formula(neuron(model, 9), neuron(model, 9, lambda weight: weight.grad))
    torch.testing.assert_close(scores_of(model, criterion)[FFN][9].double(), expected, rtol=1e-4, atol=1e-12)


def test_the_fisher_of_a_mask_is_the_squared_gradient_of_that_mask():
    model = tiny.llama()
    layer = model.model.layers[1].mlp.down_proj
    mask = torch.ones(64, requires_grad=True)
    hook = layer.register_forward_pre_hook(lambda module, given: (given[0] * mask,))
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    hook.remove()
    torch.testing.assert_close(scores_of(model, "fisher_mask")[FFN], mask.grad.square() / 2, rtol=1e-3, atol=1e-12)


def test_the_fisher_of_a_mask_over_whole_layers_masks_what_they_write():
    model = with_gradients()
    score = score_groups(model, find_group_sets(model), "fisher_mask")["model.layers/layers"]
    layers = ((layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers)
    moved = [sum((part.weight * part.weight.grad).sum() for part in parts) for parts in layers]
    torch.testing.assert_close(score, torch.stack(moved).detach().square() / 2, rtol=1e-3, atol=1e-12)


def test_the_angular_distance_is_that_between_input_and_output_of_a_layer():
    model = tiny.llama()
    stack = [group_set for group_set in find_group_sets(model) if group_set.kind == "layers"]
    with observed(model, stack, PruningConfig({"layers": 0.5}, criterion="angular").criterion_by_kind) as seen:
        for seed in (1, 2):
            tiny.logits(model, tiny.tokens(seed=seed))
    angles = []
    for seed in (1, 2):
        states = model.model(tiny.tokens(seed=seed), output_hidden_states=True).hidden_states
        before, after = (torch.stack(list(part)).double() for part in (states[:-2], states[1:-1]))
        angles.append((before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1))
    expected = torch.cat(angles, 1).arccos().mean((1, 2)) / torch.pi
    found = score_groups(model, stack, "angular", seen["angular"])["model.layers/layers"]
    torch.testing.assert_close(found[:2].double(), expected, rtol=1e-4, atol=1e-6)  # the last state has been normed


@pytest.mark.parametrize("piece", [1, 100, 2**19])
def test_sums_over_places_do_not_depend_on_the_pieces(piece, monkeypatch):
    monkeypatch.setattr("hf_slim.pruning.importance.criteria.PIECE", piece)
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 3, 0, 1), (3, 1, 0, 2)):
        weight, gradient = torch.randn(2, 5, 3, 4, 7)
        weight, gradient = weight.permute(order), gradient.permute(order)
        expected = (weight * gradient).abs().sum((2, 3))
        torch.testing.assert_close(place_sums(torch.Tensor.abs_, weight, gradient), expected)


@pytest.mark.parametrize(
    ("criterion", "formula"),
    [
        ("activation", lambda x, w: x.abs().mean(0)),
        ("wanda", lambda x, w: x.norm(dim=0) * w.abs().sum(0)),
        ("flap", lambda x, w: x.var(0, correction=0) * (w**2).sum(0)),
    ],
)
def test_criteria_of_activations_are_their_formulas(criterion, formula):
    model = tiny.llama()
    expected = formula(inputs_of(model), model.model.layers[1].mlp.down_proj.weight.detach().double())
    found = scores_of(model, criterion)[FFN].double()
    torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("criterion", ["l1", "l2", "wanda", "flap", "activation", "peak", "random"])
def test_scores_that_do_not_compare_are_put_on_one_scale(criterion):
    model = tiny.llama()
    model.model.layers[0].mlp.down_proj.weight.data.mul_(100)
    for score in scores_of(model, criterion).values():
        torch.testing.assert_close(score.mean(), torch.tensor(1.0))


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("random", "movement", "angular")])
def test_a_group_of_small_weights_matters_least(criterion):
    model = with_gradients()
    mlp = model.model.layers[1].mlp
    for weight, dim in ((mlp.up_proj.weight, 0), (mlp.gate_proj.weight, 0), (mlp.down_proj.weight, 1)):
        weight.data.select(dim, 7).mul_(1e-3)
    assert scores_of(model, criterion)[FFN].argmin() == 7


def test_magnitudes_are_the_norms_of_the_whole_group():
    model = tiny.llama()
    for criterion, order in (("l1", 1), ("l2", 2)):
        norms = torch.stack([neuron(model, index).norm(order) for index in range(64)])
        torch.testing.assert_close(scores_of(model, criterion)[FFN].double(), norms / norms.mean(), rtol=1e-5, atol=0)


def test_tails_are_the_norms_of_what_exceeds_four_times_the_mean():
    model = tiny.llama()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data[3, 5] *= 60
    mlp.down_proj.weight.data[7, 3] *= 40
    for criterion, order in (("l1_tail", 1), ("l2_tail", 2)):
        expected = torch.zeros(64, dtype=torch.float64)
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()):
            relative = weight.detach().double().abs() / weight.detach().double().abs().mean()
            expected += (relative - 4).clamp(min=0).norm(order, dim=1) + 1e-3 * relative.mean(1)
        found = scores_of(model, criterion)[FFN].double()
        torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-4, atol=1e-7)


def test_random_scores_are_the_same_every_time_and_differ_between_layers():
    first, second = scores_of(tiny.llama(), "random"), scores_of(tiny.llama(1), "random")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.layers.0.mlp/ffn"], first[FFN])


def test_a_frozen_layer_is_named():
    model = tiny.llama()
    model.model.layers[1].mlp.gate_proj.weight.requires_grad_(False)
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    with pytest.raises(SlimError, match=r"No gradient reached 'model\.layers\.1\.mlp\.gate_proj"):
        score_groups(model, find_group_sets(model), "taylor")


def test_activations_that_were_not_seen_are_asked_for():
    model = tiny.llama()
    with pytest.raises(SlimError, match=r"none of .* were recorded.*hf_slim\.prune"):
        score_groups(model, find_group_sets(model), "wanda")


def test_fused_experts_refuse_criteria_that_look_inside():
    model = tiny.mixtral()
    with pytest.raises(SlimError, match=r"Activations of .*experts' cannot be recorded.*taylor"):
        readers(model, find_group_sets(model))


def test_whole_layers_are_scored_one_by_one_from_what_they_write():
    model = with_gradients()
    score = score_groups(model, find_group_sets(model), "taylor")["model.layers/layers"]
    layers = ((layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers)
    expected = torch.stack([product(attention).sum() + product(mlp).sum() for attention, mlp in layers])
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=0)


def test_whole_layers_refuse_criteria_of_what_flows_through_neurons():
    model = tiny.llama()
    stack = [group_set for group_set in find_group_sets(model) if group_set.kind == "layers"]
    with pytest.raises(SlimError, match="cannot score whole layers"):
        score_groups(model, stack, "wanda")


def test_neurons_refuse_a_criterion_of_whole_layers():
    with pytest.raises(SlimError, match=r"cannot score kv_heads.*prune only `layers`"):
        scores_of(tiny.llama(), "angular")
