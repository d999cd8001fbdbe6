"""Adapters that are disabled for a while come back as they were."""

import pytest

from hf_slim.core.adapters import adapters_disabled
from tests.states import Broken, check_and_break, lora, state_of


@pytest.mark.parametrize("part", ["model", "layer"])
@pytest.mark.parametrize("were_disabled", [False, True])
def test_adapters_come_back_as_they_were(part, were_disabled):
    model = lora()
    layer = model.get_base_model().lm_head
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)  # trained are the other factors alone
    if were_disabled:
        model.base_model.disable_adapter_layers()
    before = state_of(model)
    with pytest.raises(Broken), adapters_disabled(model if part == "model" else layer):
        check_and_break(layer.disable_adapters)
    assert state_of(model) == before
