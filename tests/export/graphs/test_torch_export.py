"""A `.pt2` file computes what the packed model computes, without hf_slim, for batches and lengths of any size."""

import copy
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers.exporters import ExportedModel

from hf_slim import SlimError, convert, prepare
from hf_slim.export.exporter import EXPORTERS, ExportConfig
from hf_slim.export.graphs import torch_export
from hf_slim.export.graphs.interface import empty_cache, fresh, interface_of
from tests import tiny
from tests.export.graphs import mixed
from tests.test_no_pickles import is_pickle

TARGET = EXPORTERS["torch_export"]
CONFIG = ExportConfig()
ALONE = """
import sys
from transformers.exporters import ExportedModel
import torch
outputs = ExportedModel.from_pretrained(sys.argv[1])(
    input_ids=torch.tensor([[5, 7, 9, 1, 2]]), attention_mask=torch.ones(1, 5, dtype=torch.long),
    token_type_ids=torch.zeros(1, 5, dtype=torch.long),
)
assert not [name for name in sys.modules if name.split(".")[0] == "hf_slim"]
print(outputs.logits.flatten().tolist())
"""


@torch.no_grad()
def exported(model: torch.nn.Module, folder: Path) -> Path:
    model.eval()
    assert TARGET.refusal(model, None, CONFIG) == ""
    return TARGET.write(model, tiny.tokenizer(), folder, CONFIG)


@pytest.fixture(scope="module")
def decoder() -> torch.nn.Module:
    return mixed.decoder("w8a8", mixed.WEIGHTS_ONLY | {"*.gate_proj": "codebook4"}, "w4a16-g16")


@pytest.fixture(scope="module")
def decoder_file(decoder, tmp_path_factory) -> Path:
    return exported(decoder, tmp_path_factory.mktemp("decoder"))


@pytest.mark.slow
def test_every_grid_computes_the_same(decoder, decoder_file):
    with torch.no_grad():
        found = TARGET.verify(decoder, None, decoder_file, CONFIG)
    assert found.differing == 0
    weights = {id(p): torch.Size(m.float_shape("weight")).numel() if p.dtype == torch.int8 else p.numel()
               for m in decoder.modules() for p in m.parameters(recurse=False)}  # fmt: skip
    assert found.values == sum(weights.values())
    equal, _, count, *_ = found.runs["greedy tokens"].split()
    assert equal == count


@pytest.mark.slow
def test_the_file_holds_no_pickle_and_the_folder_its_tokenizer(decoder_file):
    with zipfile.ZipFile(decoder_file) as archive:
        contents = {Path(name).name: archive.read(name) for name in archive.namelist()}
    assert not any(is_pickle(content) for content in contents.values())
    tables = [json.loads(content)["config"] for name, content in contents.items() if name.endswith("_config.json")]
    assert len(tables) == 2
    assert not any(entry["use_pickle"] for table in tables for entry in table.values())
    names = {path.name for path in decoder_file.parent.iterdir()}
    assert {"model.pt2", "export.json", "config.json", "tokenizer.json"} <= names


@pytest.mark.slow
def test_codes_stay_packed_in_the_file(decoder, decoder_file):
    with zipfile.ZipFile(decoder_file) as archive:
        written = sum(one.file_size for one in archive.infolist() if "/weights/weight_" in one.filename)
    held = sum(p.numel() * p.itemsize for p in decoder.parameters())
    scales = sum(b.numel() * b.itemsize for b in decoder.buffers())
    assert written <= held + scales


@pytest.mark.slow
def test_a_file_with_another_code_is_not_published(decoder, decoder_file):
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0, 0] ^= 1
        with pytest.raises(SlimError, match="up_proj"):
            TARGET.verify(other, None, decoder_file, CONFIG)


@pytest.mark.slow
def test_many_tokens_and_rows_run_although_the_example_had_few(decoder, decoder_file):
    graph, interface = ExportedModel.from_pretrained(decoder_file.parent), interface_of(decoder, None)
    for rows, length in ((1, 1), (1, 2), (5, 40)):
        inputs = fresh(decoder, interface, rows, max(length, 4), seed=3)
        inputs = {name: value[:, :length] for name, value in inputs.items()}
        with torch.no_grad():
            expected = decoder(**inputs, **{interface.cache: empty_cache(decoder, rows)}).logits
        assert torch.equal(graph(**inputs, **{interface.cache: empty_cache(decoder, rows)}).logits, expected)


@pytest.mark.slow
def test_a_classifier_runs_in_a_process_without_hf_slim(tmp_path):
    """A process of its own, because this one has hf_slim."""
    model = mixed.packed(tiny.bert(), "w8a8", embeddings="w8a8")
    path = exported(model, tmp_path)
    with torch.no_grad():
        assert TARGET.verify(model, None, path, CONFIG).runs["logits"].startswith("equal bit for bit")
        ids = torch.tensor([[5, 7, 9, 1, 2]])
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits.flatten()
    done = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.tensor([float(n) for n in done.stdout.strip("[]\n ").split(",")]), expected)


def test_a_model_in_training_form_and_an_encoder_decoder_are_refused():
    assert "training-time form" in TARGET.refusal(prepare(tiny.llama(), tiny.QUANTIZATION), None, CONFIG)
    assert "encoder-decoder" in TARGET.refusal(tiny.t5().eval(), None, CONFIG)


def test_the_copy_that_is_traced_computes_what_the_model_computes():
    for overrides in (mixed.WEIGHTS_ONLY, mixed.BOTH_SIDES):
        model = mixed.decoder("w8a8", overrides, "w8a8")
        assert torch.equal(tiny.logits(torch_export.traceable(model)), tiny.logits(model))
    images = convert(prepare(tiny.vit(), tiny.QUANTIZATION))
    assert torch.equal(tiny.output(torch_export.traceable(images)), tiny.output(images))


def test_the_command_loads_the_folder(tmp_path):
    assert str(tmp_path) in TARGET.command(tmp_path / "model.pt2")
