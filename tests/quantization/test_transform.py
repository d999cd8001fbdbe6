import pytest
import torch
from torch import nn

from hf_slim import QuantizationConfig, SlimError, convert, prepare
from hf_slim.quantization.modules import PackedLinear, int8_linear
from hf_slim.quantization.transform import plan_quantization, quantized_layers
from tests import tiny

CONFIGS = [
    QuantizationConfig("w8a8", embeddings="w8a8"),
    QuantizationConfig("w8a16"),
    QuantizationConfig("w4a16", group_size=16, embeddings="w8a16"),
    QuantizationConfig("w4a8"),
]


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.linear_scheme()}+{config.embeddings}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_packed_model_is_the_trained_one(family, config, dtype, monkeypatch):
    model = prepare(tiny.FAMILIES[family]().to(dtype), config)
    trained = tiny.logits(model)
    convert(model)
    monkeypatch.setattr(PackedLinear, "kernel", lambda layer, input: "dequantize")
    assert torch.equal(tiny.logits(model), trained)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_the_integer_kernel_agrees_with_the_dequantized_layer(family, monkeypatch):
    model = convert(prepare(tiny.FAMILIES[family](), CONFIGS[0]))
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            activations = torch.randn(2, 5, layer.in_features)
            with torch.no_grad():
                assert layer.kernel(activations) == "int8"
                fast = layer(activations)
                with monkeypatch.context() as patched:
                    patched.setattr(PackedLinear, "kernel", lambda layer, input: "dequantize")
                    torch.testing.assert_close(fast, layer(activations), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.linear_scheme()}+{config.embeddings}")
def test_the_packed_weights_are_the_trained_ones_bit_for_bit(config):
    model = prepare(tiny.llama(), config)
    trained = {
        name: layer.forward(torch.eye(layer.in_features))
        for name, layer in model.named_modules()
        if hasattr(layer, "plain") and isinstance(layer, nn.Linear) and not layer.scheme.activation_bits
    }
    convert(model)
    for name, columns in trained.items():
        assert torch.equal(model.get_submodule(name).dequantized(torch.float32).t(), columns)


def test_int8_linear_agrees_with_exact_integers():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (5, 1, 24), generator=generator).to(torch.int8)
    scale, bias = torch.rand(5, 1, generator=generator), torch.randn(5, generator=generator)
    activations = torch.randn(2, 3, 24, generator=generator)
    step = activations.double().abs().amax(-1, keepdim=True) / 127.5
    codes = (activations.double() / step).round().clamp(-128, 127)
    expected = (codes @ weight.squeeze(1).double().t()) * step * scale.squeeze(1).double() + bias.double()
    torch.testing.assert_close(int8_linear(activations, weight, scale, bias).double(), expected, rtol=1e-4, atol=1e-4)


def test_tied_embeddings_stay_tied_and_are_packed_once():
    model = convert(prepare(tiny.llama(), CONFIGS[0]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale


def test_gradients_reach_the_input_of_a_packed_layer():
    model = convert(prepare(tiny.llama(), CONFIGS[0]))
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    activations = torch.randn(2, 48, requires_grad=True)
    layer(activations).sum().backward()
    torch.testing.assert_close(activations.grad, layer.dequantized(torch.float32).sum(0).expand(2, -1))


def test_every_layer_gets_a_scheme_or_a_reason():
    plans = plan_quantization(tiny.bert(), QuantizationConfig("w8a8", embeddings="w8a16", ignore=["classifier"]))
    by_name = {plan.name: plan for plan in plans}
    assert all(bool(plan.scheme) != bool(plan.reason) for plan in plans)
    assert by_name["classifier"].reason == "ignored by 'classifier'"
    assert by_name["bert.embeddings.position_embeddings"].reason == "not the token embedding"
    assert by_name["bert.embeddings.word_embeddings"].scheme.weight_bits == 8


def test_without_embeddings_the_tied_head_stays_float():
    model = prepare(tiny.llama(), QuantizationConfig())
    assert "lm_head" not in quantized_layers(model)
    assert "model.layers.0.mlp.up_proj" in quantized_layers(model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 20}, r"does not divide the 48 input features of .*Use one of \[16\]"),
        ({"ignore": ["*.nothing"]}, "matches no layer"),
        ({"ignore": ["*"]}, "Nothing to quantize"),
        ({"embeddings": "w8a8", "ignore": ["lm_head"]}, "share one weight"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_changes(changes, says):
    model = tiny.llama()
    with pytest.raises(SlimError, match=says):
        prepare(model, QuantizationConfig(**changes))
    assert not quantized_layers(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_no_grid_can_hold_is_named(value):
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(SlimError, match=r"layers\.1\.mlp\.up_proj.*NaN or infinite"):
        prepare(model, QuantizationConfig())


def test_a_model_of_plain_torch_is_quantized_too():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prepare(model, QuantizationConfig("w8a16"))
    trained = model(torch.ones(2, 8))
    assert torch.equal(convert(model)(torch.ones(2, 8)), trained)


def test_a_layer_that_cannot_be_quantized_yet_is_not_passed_over_in_silence():
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 2))
    plans = {plan.name: plan for plan in plan_quantization(model, QuantizationConfig())}
    assert plans["0"].reason == "Conv1d is not supported yet"
    assert plans["2"].scheme
