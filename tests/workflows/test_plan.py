"""The estimates of a dry run against sums over the parameters."""

import pytest
import yaml

from hf_slim import PruningConfig, QuantizationConfig
from hf_slim.integration.previews import Inputs, Preview, preview_pruning, preview_quantization
from hf_slim.recipe import load_recipe
from hf_slim.workflows.plan import bytes_after, describe_recipe
from tests import tiny


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_without_techniques_every_parameter_takes_four_bytes_once():
    model = tiny.llama(tie_word_embeddings=True)
    assert bytes_after(model, []) == bytes_after(model, [Preview()]) == 4 * count(model.parameters())


@pytest.mark.parametrize(("scheme", "bits"), [("w8a16", 8), ("w4a16", 4)])
def test_quantized_layers_take_their_bits_and_scales(scheme, bits):
    model = tiny.llama()
    preview = preview_quantization(model, QuantizationConfig(scheme, ignore=["lm_head"]), Inputs(None, None))
    quantized = [model.get_submodule(name).weight for name in preview.bits]
    scales = 4 * sum(len(weight) for weight in quantized)  # one in float32 per row
    expected = 4 * count(model.parameters()) - (4 - bits / 8) * count(quantized) + scales
    assert len(quantized) == 3 * 7
    assert bytes_after(model, [preview]) == pytest.approx(expected)


def test_removed_groups_take_their_bytes_along():
    model = tiny.llama()
    preview = preview_pruning(model, PruningConfig({"ffn": 0.5}, criterion="l1"), Inputs(None, None))
    neurons = count(model.model.layers[0].mlp.parameters()) / 2 * len(model.model.layers)
    assert bytes_after(model, [preview]) == pytest.approx(4 * (count(model.parameters()) - neurons))


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ({"max_steps": 4}, "training    4 steps of 6 x 16 tokens, learning rate 0.002"),
        ({"num_train_epochs": 2}, "training    2 epochs of 6 x 16 tokens, learning rate 0.002"),
    ],
)
def test_a_dry_run_says_how_much_is_trained_and_what_is_left(training, line, tmp_path):
    settings = {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.002, "use_cpu": True,
    }  # fmt: skip
    tiny.save_base(tmp_path / "base")
    (tmp_path / "data.txt").write_text("\n".join(f"line {number} of a text" for number in range(300)))
    recipe = {
        "model": str(tmp_path / "base"), "output": str(tmp_path / "small"), "training": settings | training,
        "data": {"source": str(tmp_path / "data.txt"), "block_size": 16},
        "pruning": {"sparsity": {"ffn": 0.5}, "criterion": "l1"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = describe_recipe(load_recipe(tmp_path / "recipe.yaml")).splitlines()
    before = count(tiny.llama(vocab_size=tiny.VOCAB_SIZE).parameters())
    after = (
        before - 3 * 32 * 3 * 48
    )  # half of 64 neurons in three layers, each a row of two matrices and a column of one
    assert line in lines
    assert "techniques  pruning" in lines
    assert f"parameters  {before / 1e6:.1f} M -> {after / 1e6:.1f} M" in lines
    assert f"weights     {4 * before / 1e6:.1f} MB in float32 -> about {4 * after / 1e6:.1f} MB" in lines
