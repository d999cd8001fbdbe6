"""What the quantization callback does in a single step."""

import pytest
import torch
from transformers import TrainerState

from hf_slim import QuantizationCallback, QuantizationConfig, prepare
from tests import tiny


@pytest.mark.parametrize(("step", "frozen"), [(4, False), (5, True), (9, True)])
def test_frozen_scales_get_no_gradient_and_codebooks_go_on_learning(step, frozen):
    config = QuantizationConfig("codebook3", learn="lsq", freeze=0.5)
    model = prepare(tiny.llama(), config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    callback = QuantizationCallback(config)
    callback.on_pre_optimizer_step(None, TrainerState(max_steps=10, global_step=step), None, model=model)
    names = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    scales = [name for name, _ in model.named_parameters() if name.endswith("weight_quantizer.scale")]
    assert scales
    assert any(name.endswith("weight_quantizer.codebook") for name, _ in model.named_parameters())
    assert names == (scales if frozen else [])
