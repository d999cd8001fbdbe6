"""An ONNX file holds the trained codes, and computes in ONNX Runtime what the packed model computes."""

import copy
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from hf_slim import PruningConfig, SlimError, convert, prepare, prune
from hf_slim.export.exporter import EXPORTERS, ExportConfig
from hf_slim.export.graphs import onnx, stand_ins
from hf_slim.export.graphs.comparing import relative_difference
from hf_slim.export.graphs.stand_ins import BLOCKS, FLOATS, INTEGERS
from tests import tiny
from tests.documents import ROOT, snippets
from tests.export.graphs import mixed

TARGET = EXPORTERS["onnx"]
CONFIG = ExportConfig()
MISSING = [name for name in TARGET.packages if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing: pip install 'hf_slim[onnx]'")
LAYER = "model.layers.0"


@torch.no_grad()
def exported(model: torch.nn.Module, folder: Path) -> Path:
    assert TARGET.refusal(model, None, CONFIG) == ""
    return TARGET.write(model, tiny.tokenizer(), folder, CONFIG)


@pytest.fixture(scope="module")
def decoder() -> torch.nn.Module:
    """A head and an embedding in one matrix of integers, and layers of every form."""
    return mixed.decoder("w8a8", mixed.WEIGHTS_ONLY | {"*.k_proj": "w4a8-g16"}, "w8a8")


@pytest.fixture(scope="module")
def decoder_file(decoder, tmp_path_factory) -> Path:
    return exported(decoder, tmp_path_factory.mktemp("decoder"))


@pytest.mark.slow
@needs_onnx
def test_the_graph_computes_what_the_model_computes(decoder, decoder_file):
    with torch.no_grad():
        found = TARGET.verify(decoder, None, decoder_file, CONFIG)
    assert found.differing == 0
    packed = [m for m in decoder.modules() if hasattr(m, "float_shape")]
    assert found.values >= sum(torch.Size(m.float_shape("weight")).numel() for m in packed) / 2
    equal, _, count, *_ = found.runs["greedy tokens"].split()
    assert equal == count
    assert any("MatMulInteger" in note and "MatMulNBits" in note for note in found.notes)
    assert any("float32 of the same values" in note and "nf4" in note for note in found.notes)


@pytest.mark.slow
@needs_onnx
def test_the_snippet_of_the_guide_runs(decoder, decoder_file, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(decoder_file.parent, tmp_path / "small-onnx").parent)
    ids = tiny.tokens(1, 5)
    names = {"ids": ids.numpy(), "mask": torch.ones_like(ids).numpy(), "positions": torch.arange(5)[None].numpy()}
    exec(snippets(ROOT / "docs" / "guides" / "exporting.md", "py")[0], names)
    assert relative_difference(torch.from_numpy(names["outputs"][0]), tiny.logits(decoder, ids)) < 1e-4


@pytest.mark.slow
@needs_onnx
def test_each_weight_is_in_the_file_once_and_in_few_bits(decoder, decoder_file):
    held = onnx._initializers(decoder_file)
    table = [t for t in held.values() if t.numel() == tiny.VOCAB_SIZE * 48]
    assert [t.dtype for t in table] == [torch.uint8]  # of embedding and head
    assert held[f"{LAYER}.self_attn.q_proj.codes"].numel() == 48 * 48 / 2  # four bits
    assert held[f"{LAYER}.mlp.up_proj.codes"].numel() == 64 * 48 / 4  # two bits


@pytest.mark.slow
@needs_onnx
def test_a_file_with_another_code_is_not_published(decoder, decoder_file):
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0, 0] ^= 1
        with pytest.raises(SlimError, match="up_proj"):
            TARGET.verify(other, None, decoder_file, CONFIG)


@pytest.mark.slow
@needs_onnx
def test_a_ragged_classifier_in_bfloat16_is_exported_in_float32(tmp_path):
    data = [{"input_ids": tiny.tokens()}]
    model = prune(tiny.bert(num_hidden_layers=2), PruningConfig(sparsity={"ffn": 0.3}, criterion="random"), data)
    model = mixed.packed(model.bfloat16(), "w8a8", embeddings="w8a16")
    path = exported(model, tmp_path)
    with torch.no_grad():
        found = TARGET.verify(model, None, path, CONFIG)
    assert found.differing == 0
    assert any("bfloat16" in note for note in found.notes)
    assert {"model.onnx", "model.onnx.data", "export.json", "config.json", "tokenizer.json"} <= {
        file.name for file in tmp_path.iterdir()
    }
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_a_tied_embedding_has_the_form_of_its_head():
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for scheme, form in (("w8a8", INTEGERS), ("w8a16", BLOCKS), ("nf4-g16", FLOATS)):
        forms = stand_ins.forms_of(mixed.packed(tiny.llama(), "w8a8", embeddings=scheme), onnx.KIT)
        assert forms[embedding] == forms[head] == form


def test_tied_layers_share_one_matrix():
    model = mixed.packed(tiny.llama(), "w8a8", embeddings="w8a8")
    made = stand_ins.StandIns(model, onnx.KIT)
    embedding = made("model.embed_tokens", model.model.embed_tokens)
    assert embedding.codes is made("lm_head", model.lm_head).codes


def test_layers_that_are_not_packed_have_no_stand_in():
    model = mixed.packed(tiny.llama(), "w8a8")
    made = stand_ins.StandIns(model, onnx.KIT)
    assert made("model.norm", model.model.norm) is None
    assert made("lm_head", model.lm_head) is None


def test_a_convolution_becomes_an_ordinary_one_that_rounds_its_input():
    model = mixed_images()
    path = next(name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    plain = stand_ins.StandIns(model, onnx.KIT)(path, model.get_submodule(path))
    image = torch.randn(2, 3, 16, 16)
    assert type(plain) is torch.nn.Conv2d
    assert plain._parameters["weight"].dtype == torch.float32
    torch.testing.assert_close(plain(image), model.get_submodule(path)(image))


def mixed_images() -> torch.nn.Module:
    return convert(prepare(tiny.vit(), tiny.QUANTIZATION)).eval()


def test_models_that_have_no_graph_are_refused():
    assert "training-time form" in TARGET.refusal(prepare(tiny.llama(), tiny.QUANTIZATION), None, CONFIG)
    assert "encoder-decoder" in TARGET.refusal(tiny.t5().eval(), None, CONFIG)
