import pytest
import torch

from hf_slim import DistillationConfig, PruningConfig, QuantizationConfig, SlimError, convert, prepare
from tests import tiny

ONE_SHOT = PruningConfig(sparsity={"ffn": 0.25}, criterion="l2")


def test_parameter_names_never_change_while_training():
    model = tiny.llama()
    before = [name for name, _ in model.named_parameters()]
    prepare(model, tiny.QUANTIZATION, ONE_SHOT)
    assert [name for name, _ in model.named_parameters()] == before


def test_preparing_twice_with_an_equal_config_changes_nothing():
    model = prepare(tiny.llama(), tiny.QUANTIZATION)
    layer = model.model.layers[0].mlp.up_proj
    prepare(model, QuantizationConfig(**tiny.QUANTIZATION.to_dict()))
    assert model.model.layers[0].mlp.up_proj is layer


def test_another_config_of_the_same_technique_is_refused():
    model = prepare(tiny.llama(), tiny.QUANTIZATION)
    with pytest.raises(SlimError, match="one config per technique"):
        prepare(model, QuantizationConfig(scheme="w4a16"))


def test_two_configs_of_one_technique_are_refused():
    with pytest.raises(SlimError, match="one config per technique"):
        prepare(tiny.llama(), QuantizationConfig(), QuantizationConfig(scheme="w4a16"))


def test_a_config_that_needs_a_callback_is_refused():
    with pytest.raises(SlimError, match="needs its callback"):
        prepare(tiny.llama(), DistillationConfig())


def test_converting_an_unprepared_model_is_refused():
    with pytest.raises(SlimError, match="not prepared"):
        convert(tiny.llama())


def test_pruning_a_packed_model_is_refused():
    model = convert(prepare(tiny.llama(), tiny.QUANTIZATION))
    with pytest.raises(SlimError, match="Prune before quantizing"):
        prepare(model, ONE_SHOT)


def test_quantizing_a_packed_model_again_is_refused():
    model = convert(prepare(tiny.llama(), tiny.QUANTIZATION))
    with pytest.raises(SlimError, match="packed already"):
        prepare(model, tiny.QUANTIZATION)


def test_a_config_that_is_refused_leaves_the_model_as_it_was():
    model = tiny.llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(SlimError, match="does not divide"):
        prepare(model, ONE_SHOT, QuantizationConfig(group_size=20))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    prepare(model, PruningConfig(sparsity={"ffn": 0.5}, criterion="l1"))  # nothing was claimed either
