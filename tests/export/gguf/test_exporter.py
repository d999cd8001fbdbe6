"""GGUF files hold the values that were trained, bit for bit, and are the same model for whoever loads them."""

import numpy as np
import pytest
import torch

from hf_slim import QuantizationConfig, SlimError, export_model, prepare
from hf_slim.export.exporter import EXPORTERS, ExportConfig
from tests import tiny
from tests.export import models
from tests.export.gguf.files import formed, forms, logits_of, tensors, written

pytest.importorskip("gguf", reason="needs the package gguf")
EXACT = ["w4a16-g32", "w4a16-g64", "w4a16-g128", "w3a16-g32", "w2a16-g64", "w1.58a8", "w4a8-g32", "float"]
ROUNDED = ["w8a8", "w8a16", "w4a16", "w5a16", "w6a16"]


@pytest.mark.parametrize("scheme", EXACT)
def test_every_value_is_exact(scheme, tmp_path):
    model = formed(models.llama(), scheme)
    found = written(model, tmp_path).verification
    assert (found.differing, found.largest_error) == (0, 0)
    assert (
        found.values
        == sum(
            layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, torch.nn.Linear)
        )
        - model.lm_head.weight.numel()
        + model.model.embed_tokens.weight.numel()
        + 7 * 128
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "float"])
@pytest.mark.parametrize("family", models.DECODERS)
def test_every_family_is_written_whole(family, scheme, tied, tmp_path):
    model = formed(models.DECODERS[family](tie_word_embeddings=tied), scheme)
    one = written(model, tmp_path)
    assert one.verification.differing == 0
    assert ("output.weight" in forms(one)) != tied
    assert len(forms(one)) == len({id(parameter) for parameter in model.parameters()})


@pytest.mark.parametrize("scheme", ["w4a16-g32", "float"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_transformers_makes_the_same_model_of_the_file(family, scheme, tmp_path, monkeypatch):
    tiny.only_reference_kernels(monkeypatch)
    model = formed(models.DECODERS[family](), scheme)
    ids = models.tokens()
    torch.testing.assert_close(logits_of(written(model, tmp_path).path, ids), tiny.logits(model, ids))


def test_an_encoder_is_written_with_its_tokenizer(tmp_path):
    model = models.packed(models.bert(), "w4a16-g32", embeddings="w4a16-g32")
    one = export_model(model, tmp_path / "out", "gguf", models.word_pieces()).exports[0]
    assert one.verification.differing == 0
    assert forms(one)["token_types.weight"] == forms(one)["position_embd.weight"] == "F32"
    assert forms(one)["token_embd.weight"] == "Q4_0"
    assert "mean" in " ".join(one.verification.notes)
    assert one.command.startswith(f"llama-embedding -m {one.path}")


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        ("w1.58a8", "TQ2_0"),
        ("w2a16-g256", "Q2_K"),
        ("w3a16-g256", "Q3_K"),
        ("w4a16-g256", "Q4_0"),
        ("w3a16-g64", "Q4_0"),
    ],
)
def test_the_smallest_format_that_holds_the_codes_is_taken(scheme, form, tmp_path):
    model = models.packed(models.llama(hidden_size=256, num_attention_heads=8, num_hidden_layers=1), scheme)
    one = written(model, tmp_path)
    assert {forms(one)[f"blk.0.{name}.weight"] for name in ("attn_k", "ffn_down")} == {form}
    assert forms(one)["token_embd.weight"] == "F32"
    assert one.verification.differing == 0


def test_one_scale_for_a_matrix_is_written_beside_it(tmp_path):
    model = models.packed(models.llama(), "w8a16-tensor")
    one = written(model, tmp_path)
    scales = {tensor.name: tensor.data for tensor in tensors(one).values() if tensor.name.endswith(".scale")}
    layer = model.model.layers[1].self_attn.o_proj
    assert np.array_equal(scales["blk.1.attn_output.scale"], layer.weight_scale.view(1).numpy())
    assert len(scales) == 3 * 7


@pytest.mark.parametrize("scheme", ROUNDED)
def test_scales_that_do_not_fit_are_refused_or_rounded_on_request(scheme, tmp_path):
    model = models.packed(models.llama(), scheme)
    with pytest.raises(SlimError, match=r"float16 does not hold.*w4a16-g32.*--allow-rounding"):
        written(model, tmp_path)
    assert not list(tmp_path.iterdir())
    found = written(model, tmp_path, allow_rounding=True).verification
    assert 0 < found.differing < found.values
    assert 0 < found.largest_error <= 2**-11


def test_an_int8_embedding_under_int4_layers_is_named(tmp_path):
    model = models.packed(models.llama(), "w4a16-g32", embeddings="w8a16")
    with pytest.raises(SlimError, match=r"1 of \d+ tensors.*'token_embd.weight'"):
        written(model, tmp_path)
    one = written(model, tmp_path, allow_rounding=True)
    assert forms(one)["token_embd.weight"] == "Q8_0"
    assert one.verification.differing <= model.lm_head.out_features * 128


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("nf4", "'nf4'"), ("codebook4", "'codebook'"), ("fp8", "'fp8'"), ("w4a16-g32-asym", "zero points"),
        ("w4a16-g16", "groups of 16"), ("w8a16-unsigned", "codes from 0 to 255"),
    ],
)  # fmt: skip
def test_other_grids_are_refused_with_those_that_fit(scheme, reason, tmp_path):
    with pytest.raises(SlimError, match=rf"{reason}.*w4a16-g32"):
        written(models.packed(models.llama(), scheme), tmp_path, allow_rounding=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "form"), [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")])
def test_floats_keep_their_dtype_but_for_vectors(dtype, form, tmp_path):
    one = written(models.llama().to(dtype), tmp_path)
    assert forms(one)["blk.0.attn_q.weight"] == forms(one)["token_embd.weight"] == form
    assert forms(one)["blk.0.attn_norm.weight"] == forms(one)["output_norm.weight"] == "F32"
    assert one.verification.differing == 0


def test_an_error_in_a_file_is_noticed(tmp_path):
    """The check after writing compares with the model, and not with what was written."""
    model = models.packed(models.llama(), "w4a16-g32")
    one = written(model, tmp_path)
    exporter = EXPORTERS["gguf"]
    tensor = tensors(one)["blk.2.ffn_up.weight"]
    data = bytearray(one.path.read_bytes())
    data[tensor.data_offset + 5] ^= 1
    one.path.write_bytes(data)
    with pytest.raises(SlimError, match="1 values"):
        exporter.verify(model, None, one.path, ExportConfig())
    found = exporter.verify(model, None, one.path, ExportConfig(allow_rounding=True))
    assert found.differing == 1


def test_activations_that_llama_cpp_rounds_otherwise_are_told(tmp_path):
    told = written(models.packed(models.llama(), "w4a8-g32"), tmp_path).verification.notes
    assert any("w4a8-g32" in note for note in told)
    assert not written(models.packed(models.llama(), "w4a16-g32"), tmp_path / "other").verification.notes


def test_a_model_in_training_is_refused(tmp_path):
    with pytest.raises(SlimError, match="training-time form"):
        written(prepare(models.llama(), QuantizationConfig("w4a16-g32")), tmp_path)
