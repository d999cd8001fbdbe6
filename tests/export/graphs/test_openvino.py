"""An OpenVINO graph holds the trained codes in few bits, and computes what the packed model computes."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from hf_slim import SlimError, prepare
from hf_slim.export.exporter import EXPORTERS, ExportConfig
from hf_slim.export.graphs import openvino, stand_ins
from hf_slim.export.graphs.stand_ins import FLOATS, GROUPS
from tests import tiny
from tests.export.graphs import mixed

TARGET = EXPORTERS["openvino"]
CONFIG = ExportConfig()
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino missing: pip install 'hf_slim[openvino]'"
)


@torch.no_grad()
def exported(model: torch.nn.Module, folder: Path) -> Path:
    assert TARGET.refusal(model, None, CONFIG) == ""
    return TARGET.write(model, tiny.tokenizer(), folder, CONFIG)


@pytest.fixture(scope="module")
def decoder() -> torch.nn.Module:
    return mixed.decoder("w8a16", mixed.WEIGHTS_ONLY | {"*.gate_proj": "w8a8"}, "w8a16")


@pytest.fixture(scope="module")
def decoder_file(decoder, tmp_path_factory) -> Path:
    return exported(decoder, tmp_path_factory.mktemp("decoder"))


@pytest.mark.slow
@needs_openvino
def test_the_graph_computes_what_the_model_computes(decoder, decoder_file):
    with torch.no_grad():
        found = TARGET.verify(decoder, None, decoder_file, CONFIG)
    equal, _, count, *_ = found.runs["greedy tokens"].split()
    assert equal == count
    assert found.tensors == 11  # q, k, v, gate and up of two layers, and one table for embedding and head
    assert any("DYNAMIC_QUANTIZATION_GROUP_SIZE" in note for note in found.notes)
    assert {"openvino_model.xml", "openvino_model.bin", "export.json", "config.json", "tokenizer.json"} <= {
        file.name for file in decoder_file.parent.iterdir()
    }


@pytest.mark.slow
@needs_openvino
def test_codes_take_the_space_of_their_bits(decoder, decoder_file):
    import openvino as runtime

    constants = [op for op in runtime.Core().read_model(decoder_file).get_ops() if op.get_type_name() == "Constant"]
    shapes = {kind: [list(c.shape) for c in constants if c.get_element_type() == kind] for kind in
              (runtime.Type.i4, runtime.Type.i8, runtime.Type.f32)}  # fmt: skip
    assert shapes[runtime.Type.i4].count([48, 3, 16]) == 2  # w4a16-g16
    assert shapes[runtime.Type.i4].count([64, 3, 16]) == 2  # w2a16-g16
    assert shapes[runtime.Type.i8].count([tiny.VOCAB_SIZE, 48]) == 1
    assert [tiny.VOCAB_SIZE, 48] not in shapes[runtime.Type.f32]


@pytest.mark.slow
@needs_openvino
def test_a_file_with_another_code_is_not_published(decoder, decoder_file):
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0, 0] ^= 1
        with pytest.raises(SlimError, match="up_proj"):
            TARGET.verify(other, None, decoder_file, CONFIG)


def test_groups_that_divide_the_columns_stay_codes():
    model = mixed.packed(tiny.llama(), "w4a16-g8", {"*.o_proj": "nf4-g16"}, "w8a8")
    forms = stand_ins.forms_of(model, openvino.KIT)
    assert {path.split(".")[-2]: form for path, form in forms.items()} == {
        "embed_tokens": GROUPS, "lm_head": GROUPS, "q_proj": GROUPS, "k_proj": GROUPS, "v_proj": GROUPS,
        "o_proj": FLOATS, "gate_proj": GROUPS, "up_proj": GROUPS, "down_proj": GROUPS,
    }  # fmt: skip


@torch.no_grad()
def test_stand_ins_compute_the_same_in_pytorch():
    inputs = torch.randn(3, 5, 64)
    for scheme in ("w8a16", "w4a16-g16", "w4a8-g32", "w8a8-static", "w2a16", "w1.58a8"):
        layer = mixed.packed_layer(torch.nn.Linear(64, 24), scheme, inputs)
        model = torch.nn.Sequential(layer)
        matrix = stand_ins.matrix_of(model, "0.weight", GROUPS)
        found, expected = openvino.GroupLinear(layer, matrix)(inputs), layer(inputs)
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max(), scheme


def test_models_that_have_no_graph_are_refused():
    assert "training-time form" in TARGET.refusal(prepare(tiny.llama(), tiny.QUANTIZATION), None, CONFIG)
