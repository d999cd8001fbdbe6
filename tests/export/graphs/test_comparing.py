"""A graph that computes something else is not taken for the model, and rounding is not taken for something else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_slim import SlimError
from hf_slim.export.graphs.comparing import ALLOWED, compared, noise_effect, relative_difference
from hf_slim.export.graphs.interface import interface_of
from tests import tiny
from tests.export.graphs.mixed import packed

MODELS = {"llama": tiny.llama, "bert": tiny.bert, "vit": tiny.vit}


def graph_of(model: torch.nn.Module, change: Callable[[Any], Any] = lambda outputs: outputs) -> Callable:
    def run(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return change(model(**inputs))

    return run


@pytest.mark.parametrize("name", MODELS)
def test_the_model_itself_is_equal(name):
    model = MODELS[name]().eval()
    with torch.no_grad():
        found = compared(model, graph_of(model), interface_of(model, None))
    assert found.difference == 0
    assert found.equal_tokens == found.tokens
    assert (found.tokens > 0) == (name == "llama")
    assert found.as_runs()["logits"].startswith("equal bit for bit")


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_with_one_other_weight_is_refused(name):
    model, other = MODELS[name]().eval(), MODELS[name]().eval()
    with torch.no_grad():
        weight = [p for n, p in other.named_parameters() if p.dim() >= 2 and "embed" not in n][-2]
        weight *= 1.01
        with pytest.raises(SlimError, match="something else"):
            compared(model, graph_of(other), interface_of(model, None))


def test_a_graph_that_says_nan_is_refused():
    model = tiny.bert().eval()

    def broken(outputs: Any) -> Any:
        outputs["logits"] = outputs["logits"] * torch.nan
        return outputs

    with torch.no_grad(), pytest.raises(SlimError, match="something else"):
        compared(model, graph_of(model, broken), interface_of(model, None))


def test_a_graph_that_forgets_its_cache_is_refused():
    model = tiny.llama().eval()
    interface = interface_of(model, None)

    def run(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            alone = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])
            model(**inputs)  # fills the cache, which the logits do not see
        alone["past_key_values"] = inputs[interface.cache]
        return alone

    with torch.no_grad(), pytest.raises(SlimError, match="something else"):
        compared(model, run, interface)


def test_what_padding_says_does_not_count():
    model = tiny.bert_mlm().eval()

    def disturbed(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            outputs = model(**inputs)
        outputs["logits"] = outputs["logits"] + 5.0 * (1 - inputs["attention_mask"]).unsqueeze(-1)
        return outputs

    with torch.no_grad():
        assert compared(model, disturbed, interface_of(model, None)).difference == 0


def test_noise_does_more_where_inputs_are_rounded():
    with torch.no_grad():
        plain, rounding = (packed(tiny.llama(), scheme) for scheme in ("w8a16", "w2a16"))
        for model in (plain, rounding):
            assert 0 < noise_effect(model, interface_of(model, None)) < ALLOWED[torch.float32]
        coarse = packed(tiny.llama(), "w8a4")
        assert noise_effect(coarse, interface_of(coarse, None)) >= 0


def test_differences_are_relative_to_the_largest_value():
    expected = torch.tensor([0.0, -4.0, 1.0])
    assert relative_difference(torch.tensor([1.0, -4.0, 1.0]), expected) == 0.25
    assert relative_difference(torch.tensor([torch.nan, -4.0, 1.0]), expected) == float("inf")
