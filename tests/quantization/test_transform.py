import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from hf_slim import Grid, QuantizationConfig, Scheme, SlimError, convert, prepare
from hf_slim.quantization.layers.families import FAMILIES
from hf_slim.quantization.plan import plan_quantization
from hf_slim.quantization.scheme import SCHEMES
from hf_slim.quantization.transform import quantized_layers
from tests import tiny

GIVEN = Scheme(
    Grid(granularity="tensor", symmetric=False, signed=False, rounding="floor", scale=1 / 127.5, zero_point=127)
)
# groups of 16 divide every tiny model; every named scheme is here, with the options that change storage
NAMED = {name: QuantizationConfig(name, group_size=16 if name in ("nf4", "fp4") else None) for name in SCHEMES}
SCHEME_CASES = NAMED | {
    "groups, tied embeddings": QuantizationConfig("w4a16-g16", embeddings="w8a16"),
    "tied embeddings": QuantizationConfig("w8a8", embeddings="w8a8"),
    "nf4 embeddings": QuantizationConfig("w8a16", embeddings="nf4-g16"),
    "asymmetric groups": QuantizationConfig("w3a16-g16-asym", embeddings="w4a16-asym"),
    "per tensor": QuantizationConfig("w8a8-tensor"),
    "floor": QuantizationConfig("w5a16-floor-unsigned-asym"),
    "codebook per channels": QuantizationConfig(Scheme(Grid("codebook", 2, codebook_channels=1))),
    "Q and B": QuantizationConfig(GIVEN),
    "mse": QuantizationConfig("w2a16-g16", observer="mse"),
    "mixed": QuantizationConfig("w4a16-g16", overrides={"*": "w8a8", "*[02468]*": "w6a16"}),
}  # fmt: skip
AUTO = {
    "llama": AutoModelForCausalLM, "qwen3": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM,
    "mixtral": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification, "bert_mlm": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM, "vit": AutoModelForImageClassification,
}  # fmt: skip


def config_for(case, family):
    config = SCHEME_CASES[case]
    small = family == "cnn" and config.linear_scheme().weights.group_size  # 27 inputs of its first convolution
    return QuantizationConfig.from_dict(config.to_dict() | {"ignore": ["0", "2"]}) if small else config


def in_dtype(model, dtype):
    """Parameters alone: `from_pretrained` leaves buffers, such as rotary frequencies, in float32 as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("family", list(tiny.ALL_FAMILIES))
@pytest.mark.parametrize("case", list(SCHEME_CASES))
def test_prepared_equals_packed_equals_reloaded(family, case, monkeypatch, tmp_path):
    tiny.only_reference_kernels(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        model = prepare(in_dtype(tiny.ALL_FAMILIES[family](), dtype), config_for(case, family))
        trained = tiny.output(model)
        assert not torch.equal(trained, tiny.output(in_dtype(tiny.ALL_FAMILIES[family](), dtype)))
        convert(model)
        assert torch.equal(tiny.output(model), trained)
        if family in AUTO:
            model.save_pretrained(tmp_path / str(dtype))
            loaded = AUTO[family].from_pretrained(tmp_path / str(dtype))
            assert torch.equal(tiny.output(loaded), trained)


@pytest.mark.parametrize("family", list(tiny.ALL_FAMILIES))
def test_weights_really_take_the_bits_that_the_scheme_says(family):
    model = tiny.ALL_FAMILIES[family]()
    config = QuantizationConfig("w3a16")
    matrices = {
        name: sum(rows * columns for rows, columns in found.shapes(module).values())
        for name, module in model.named_modules()
        for found in [next((f for f in FAMILIES if f.matches(module)), None)]
        if found
    }
    convert(prepare(model, config))
    for name, scheme in quantized_layers(model).items():
        layer = model.get_submodule(name)
        stored = sum(p.numel() for p in layer.parameters(recurse=False) if p.dtype == torch.int8)
        assert stored * 8 <= matrices[name] * 3 * 1.15  # rows end at whole bytes
        assert scheme == config.linear_scheme()


def test_tied_embeddings_stay_tied_and_are_packed_once():
    model = convert(prepare(tiny.llama(), QuantizationConfig("w8a8", embeddings="w4a8-asym")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    assert model.lm_head.weight_zero_point is model.model.embed_tokens.weight_zero_point


def test_experts_are_quantized_and_their_router_is_left_alone():
    plans = {plan.name: plan for plan in plan_quantization(tiny.mixtral(), QuantizationConfig("w8a8"))}
    assert str(plans["model.layers.0.mlp.experts"].scheme) == "w8a16"  # inner activations never leave the module
    assert "is not a supported layer" in plans["model.layers.0.mlp.gate"].reason
    model = convert(prepare(tiny.mixtral(), QuantizationConfig("w8a8")))
    assert model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.int8


def test_every_layer_gets_a_scheme_or_a_reason():
    plans = plan_quantization(tiny.bert(), QuantizationConfig("w8a8", embeddings="w8a16", ignore=["classifier"]))
    by_name = {plan.name: plan for plan in plans}
    assert all(bool(plan.scheme) != bool(plan.reason) for plan in plans)
    assert by_name["classifier"].reason == "ignored by 'classifier'"
    assert by_name["bert.embeddings.position_embeddings"].reason == "not the token embedding"
    assert str(by_name["bert.embeddings.word_embeddings"].scheme) == "w8a16"


def test_every_matrix_of_a_model_is_in_the_plan():
    for build in tiny.ALL_FAMILIES.values():
        model = build()
        named = {plan.name for plan in plan_quantization(model, QuantizationConfig("w8a16"))}
        holders = {n for n, m in model.named_modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
        assert named == holders


def test_without_embeddings_the_tied_head_stays_float():
    model = prepare(tiny.llama(), QuantizationConfig())
    assert "lm_head" not in quantized_layers(model)
    assert "model.layers.0.mlp.up_proj" in quantized_layers(model)


def test_overrides_give_layers_schemes_of_their_own():
    config = QuantizationConfig("w4a16", overrides={"*.mlp.*": "w8a8", "*.down_proj": "nf4-g16"})
    schemes = quantized_layers(convert(prepare(tiny.llama(), config)))
    assert str(schemes["model.layers.0.self_attn.q_proj"]) == "w4a16"
    assert str(schemes["model.layers.0.mlp.up_proj"]) == "w8a8"
    assert str(schemes["model.layers.1.mlp.down_proj"]) == "nf4-g16"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 20}, r"does not divide the 48 input features of .*Use one of \[8, 12, 16, 24, 48\]"),
        ({"ignore": ["*.nothing"]}, "`ignore` pattern '\\*.nothing' matches no layer"),
        ({"overrides": {"*.nothing": "nf4"}}, "`overrides` pattern '\\*.nothing' matches no layer"),
        ({"ignore": ["*"]}, "Nothing to quantize"),
        ({"embeddings": "w8a8", "ignore": ["lm_head"]}, "share one weight"),
        ({"embeddings": "codebook4"}, "reads single rows"),
        ({"embeddings": "w8a8-tensor"}, "reads single rows"),
        ({"learn_activations": "pact"}, "no layer has them"),
        ({"scheme": Scheme(Grid("codebook", 2, codebook_channels=7))}, "does not divide the 48 output channels"),
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


def test_an_integer_weight_is_named():
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int32), requires_grad=False)
    with pytest.raises(SlimError, match=r"'0.weight' has dtype torch.int32"):
        prepare(model, QuantizationConfig())


def test_a_layer_that_cannot_be_quantized_is_not_passed_over_in_silence():
    model = nn.Sequential(nn.ConvTranspose1d(1, 4, 3), nn.Flatten(), nn.Linear(24, 2))
    plans = {plan.name: plan for plan in plan_quantization(model, QuantizationConfig())}
    assert plans["0"].reason == "ConvTranspose1d is not a supported layer"
    assert plans["2"].scheme


def test_attention_that_reads_a_weight_past_its_layer_is_left_alone():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    plans = {plan.name: plan for plan in plan_quantization(model, QuantizationConfig())}
    assert "not a supported layer" in plans["self_attn.out_proj"].reason
    assert plans["linear1"].scheme


def test_the_plain_copy_of_a_prepared_model_is_the_untouched_one():
    for build in tiny.ALL_FAMILIES.values():
        expected = tiny.output(build())
        model = prepare(build(), QuantizationConfig("w2a16"))
        twin = copy.deepcopy(model)
        for name, module in list(twin.named_modules()):
            if hasattr(module, "plain"):
                plain = module.plain()
                assert "quantizer" not in str(plain)
                twin.set_submodule(name, plain)
        assert torch.equal(tiny.output(twin), expected)
