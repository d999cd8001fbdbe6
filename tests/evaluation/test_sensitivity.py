import itertools

import pytest
import torch

from hf_slim import QuantizationConfig, SlimError, prepare
from hf_slim.evaluation.sensitivity import LayerSensitivity, SchemeTrial, choose_schemes, measure_sensitivity
from hf_slim.quantization.transform import quantized_layers
from tests import tiny

SCHEMES = ["w2a16-g16", "w4a16-g16", "w8a16"]


def layers(seed, n=5):
    """Random sensitivities whose harm falls, mostly, as bits rise."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(n):
        harm = torch.rand(3, generator=generator).sort(descending=True).values.tolist()
        choices = [
            SchemeTrial(scheme, bits, value, value)
            for scheme, bits, value in zip("abc", (2.0, 4.0, 8.0), harm, strict=True)
        ]
        found.append(LayerSensitivity(f"layer{index}", 100, tuple(choices)))
    return found


def test_measuring_leaves_the_model_as_it_was_and_finds_coarse_grids_worse():
    model = tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_sensitivity(model, tiny.tokens(2).unsqueeze(1), SCHEMES)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not quantized_layers(model)
    assert len(found) == 21  # every linear layer; the tied head has no scheme of its own
    # queries and keys of a random model hardly matter: one by one their harm is float rounding, in sum it is not
    assert all(choice.divergence > -1e-6 for layer in found for choice in layer.choices)
    harm = {
        scheme: sum(c.divergence for layer in found for c in layer.choices if c.scheme == scheme) for scheme in SCHEMES
    }
    assert harm["w2a16-g16"] > 10 * harm["w4a16-g16"] > 100 * harm["w8a16"] > 0


def test_the_harm_of_one_layer_is_that_of_a_model_with_only_this_layer_quantized():
    ids = tiny.tokens(1)
    found = {layer.name: layer for layer in measure_sensitivity(tiny.llama(), [ids], SCHEMES)}
    name = "model.layers.1.mlp.down_proj"
    others = [layer for layer in found if layer != name]
    model = prepare(tiny.llama(), QuantizationConfig("w2a16-g16", ignore=others))
    base, now = tiny.logits(tiny.llama(), ids)[0, :-1].double(), tiny.logits(model, ids)[0, :-1].double()
    p = base.softmax(-1)
    expected = (p * (base.log_softmax(-1) - now.log_softmax(-1))).sum(-1).mean().item()
    measured = next(choice for choice in found[name].choices if choice.scheme == "w2a16-g16")
    assert measured.divergence == pytest.approx(expected, rel=1e-2, abs=1e-7)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("budget", [2.5, 4.0, 5.5])
def test_the_choice_keeps_to_the_budget_and_is_near_the_best_of_all(seed, budget):
    found = layers(seed)
    chosen = choose_schemes(found, budget)
    by_name = [{choice.scheme: choice for choice in layer.choices} for layer in found]

    def cost(pick):
        picked = [choices[scheme] for choices, scheme in zip(by_name, pick, strict=True)]
        return sum(c.bits for c in picked) / len(picked), sum(c.divergence for c in picked)

    bits, harm = cost(chosen.values())
    assert bits <= budget
    best = min(h for b, h in map(cost, itertools.product("abc", repeat=len(found))) if b <= budget)
    dearest_step = max(layer.choices[0].divergence - layer.choices[2].divergence for layer in found)
    assert best <= harm <= best + dearest_step  # greedy along the hull misses by one step at most


def test_a_budget_that_nothing_meets_is_refused():
    with pytest.raises(SlimError, match=r"the coarsest of these schemes take 2\.00"):
        choose_schemes(layers(0), 1.5)


def test_schemes_that_fit_no_layer_are_refused():
    with pytest.raises(SlimError, match="None of the schemes"):
        measure_sensitivity(tiny.llama(), [tiny.tokens(1)], ["w4a16-g20"])
