"""Which format a model gets: the first that holds it exactly, the one that was asked for, or a refusal beforehand."""

import json
import logging

import pytest
import torch
from torch import nn

from hf_slim import PruningConfig, QuantizationConfig, SlimConfigError, convert, prepare
from hf_slim.integration.formats.choice import AUTO
from hf_slim.integration.formats.format import FORMATS
from hf_slim.quantization.config import SAVE_FORMATS
from hf_slim.quantization.layers.training import FakeQuantLinear
from tests import tiny
from tests.integration.formats.cells import plain_model

NARROWER = PruningConfig(sparsity={"ffn": 0.4}, uniform=False, criterion="l2")
ALIKE = PruningConfig(sparsity={"ffn": 0.5}, uniform=True, criterion="l2")
EXPECTED = {
    "w8a8": "compressed-tensors",
    "w4a16-g16": "compressed-tensors",
    "w3a16": "compressed-tensors",
    "w4a8": "compressed-tensors",
    "w8a8-asym": "compressed-tensors",
    "w8a16-asym": "slim",  # whose zero points would be packed, which transformers does not load
    "w4a16-unsigned": "slim",
    "fp8": "compressed-tensors",
    "nf4-g32": "bitsandbytes",
    "fp4-g32": "bitsandbytes",
    "codebook3": "slim",
    "w1.58a8": "slim",
}


FAMILIES = [
    ("gpt2", "w8a8", "slim"),  # no linear layers, which bitsandbytes knows
    ("gpt2", "nf4-g32", "bitsandbytes"),
    ("t5", "w8a8", "slim"),  # reads weights while it is loaded
]


def saved_as(model: nn.Module) -> str:
    return model.config.quantization_config.save_format


def packed(family: str = "llama", *more: object, **settings: object) -> nn.Module:
    return convert(prepare(plain_model(family), QuantizationConfig(**settings), *more))


def test_the_setting_knows_every_format():
    assert set(SAVE_FORMATS) == {AUTO, *FORMATS}


@pytest.mark.parametrize("scheme", EXPECTED)
def test_a_scheme_gets_the_first_format_that_holds_it(scheme):
    assert saved_as(packed(scheme=scheme)) == EXPECTED[scheme]


@pytest.mark.parametrize(
    ("scheme", "embeddings", "name"),
    [
        ("w8a16", "w8a16", "gemma"),
        ("w4a16", "w2a16", "gemma"),
        ("w4a16-g16", "w8a16", "slim"),
        ("w8a8", "w8a8", "slim"),
    ],
)
def test_quantized_embeddings_get_gemma_where_all_is_per_channel(scheme, embeddings, name):
    assert saved_as(packed(scheme=scheme, embeddings=embeddings)) == name


@pytest.mark.parametrize(("family", "scheme", "name"), FAMILIES)
def test_some_families_do_not_fit_some_formats(family, scheme, name):
    assert saved_as(packed(family, scheme=scheme)) == name


def test_other_sizes_in_some_layers_need_a_slim_folder():
    assert saved_as(packed("llama", NARROWER, scheme="w8a8")) == "slim"
    assert saved_as(packed("llama", ALIKE, scheme="w8a8")) == "compressed-tensors"


def test_trained_zero_points_lie_between_codes_and_need_a_slim_folder():
    model = prepare(plain_model("llama"), QuantizationConfig("w8a8", learn="lsq+"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("offset"):
                parameter += 0.37 * parameter.abs().mean() + 1e-3
    assert saved_as(convert(model)) == "slim"


def test_what_was_asked_for_is_done():
    assert saved_as(packed(scheme="w8a8", save_format="slim")) == "slim"
    assert saved_as(packed(scheme="w8a16", save_format="gemma")) == "gemma"


@pytest.mark.parametrize(
    ("settings", "more", "says"),
    [
        ({"scheme": "codebook3", "save_format": "gemma"}, (), "symmetric integers of 2, 4 or 8 bits"),
        (
            {"scheme": "w4a16-g16", "save_format": "gemma"},
            (),
            "Formats that hold this model: compressed-t",
        ),
        ({"scheme": "w8a16", "embeddings": "w8a16", "save_format": "compressed-tensors"}, (), "is no linear layer"),
        ({"scheme": "w8a8", "learn": "lsq+", "save_format": "compressed-tensors"}, (), "no whole numbers"),
        ({"scheme": "w8a8", "save_format": "compressed-tensors"}, (NARROWER,), "sizes that the config"),
        ({"scheme": "w8a16", "save_format": "bitsandbytes"}, (), "nf4 or fp4"),
    ],
)
def test_a_format_that_cannot_hold_the_result_is_refused_before_training(settings, more, says):
    model = plain_model("llama")
    with pytest.raises(SlimConfigError, match=says):
        prepare(model, QuantizationConfig(**settings), *more)
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())  # nothing has changed


def test_a_name_that_does_not_exist_gets_the_nearest_one():
    with pytest.raises(SlimConfigError, match="Did you mean 'compressed-tensors'"):
        QuantizationConfig("w8a8", save_format="compressed_tensors")


def test_the_log_says_which_format_and_why(caplog):
    with caplog.at_level(logging.INFO, logger="hf_slim"):
        packed(scheme="w8a16", embeddings="w8a16")
    (line,) = [record.getMessage() for record in caplog.records if "format" in record.getMessage()]
    assert "'gemma'" in line
    assert "Not compressed-tensors: 'model.embed_tokens' is no linear layer" in line


def test_training_checkpoints_stay_as_they_were(tmp_path):
    model = prepare(plain_model("llama"), QuantizationConfig("w8a8"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "hf_slim"
    assert saved["mode"] == "qat"
    loaded = type(model).from_pretrained(tmp_path)
    assert saved_as(convert(loaded)) == "compressed-tensors"
    assert torch.equal(tiny.logits(loaded), tiny.logits(convert(model)))
