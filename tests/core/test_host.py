import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_slim.core.host import (
    config_of,
    config_value,
    field_of,
    is_transposed_linear,
    main_input_name,
    method_or_none,
    parameter_or_none,
    text_config_of,
)
from tests import tiny


def test_parts_of_a_transformers_model_are_read_by_name():
    model = tiny.llama()
    assert config_of(model) is model.config
    assert config_value(model, "hidden_size") == model.config.hidden_size
    assert text_config_of(model) is model.config.get_text_config()
    assert main_input_name(model) == "input_ids"
    assert method_or_none(model, "get_output_embeddings")() is model.lm_head
    assert parameter_or_none(model.lm_head, "weight") is model.lm_head.weight


def test_a_module_without_these_parts_gives_none_or_the_default():
    module = nn.Linear(2, 3, bias=False)
    assert config_of(module) is None
    assert text_config_of(module) is None
    assert main_input_name(module) is None
    assert method_or_none(module, "get_encoder") is None
    assert parameter_or_none(module, "bias") is None
    assert config_value(module, "hidden_size", 7) == 7
    assert field_of(None, "hidden_size", 7) == 7


@pytest.mark.parametrize("module", [Conv1D(3, 2), nn.Linear(2, 3)], ids=["Conv1D", "Linear"])
def test_a_transposed_linear_layer_is_recognised(module):
    output = module(torch.eye(2)) - module(torch.zeros(1, 2))  # equal to the weight as (in, out)
    assert torch.allclose(output, module.weight if is_transposed_linear(module) else module.weight.t(), atol=1e-6)
    assert is_transposed_linear(module) == isinstance(module, Conv1D)
