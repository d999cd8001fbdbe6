import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_slim import SlimError
from hf_slim.integration.loading import load_model, located
from tests import tiny


def test_a_model_loads_from_its_folder(tmp_path):
    assert torch.equal(tiny.logits(load_model(str(tiny.save_base(tmp_path)))), tiny.logits(tiny.llama()))


def test_a_checkpoint_without_some_weights_is_refused_and_not_filled_with_noise(tmp_path):
    file = tiny.save_base(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SlimError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("package:json/nothing.bin", "carries no 'nothing.bin'"),
        ("package:not a module/x", "package:<module>/<file>"),
        ("/no/such/folder", "does not exist"),
        ("nowhere.gguf", "does not exist"),
    ],
)
def test_a_place_that_does_not_exist_is_named(spec, says):
    with pytest.raises(SlimError, match=says):
        located(spec)
