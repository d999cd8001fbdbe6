"""Slim folders without `import hf_slim`: they fail loudly, or load with `trust_remote_code=True`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_slim import PruningConfig, QuantizationConfig, convert, prepare
from hf_slim.integration.config_json import save_as_
from hf_slim.integration.formats.remote_code import FILE
from tests import tiny
from tests.integration.formats.cells import plain_model

NARROWER = PruningConfig(sparsity={"ffn": 0.4}, uniform=False, criterion="l2")
SLIM = {"packed": [QuantizationConfig("codebook3")], "pruned": [NARROWER]}


@pytest.fixture(params=SLIM)
def made(request, tmp_path):
    model = convert(prepare(plain_model("llama"), *SLIM[request.param]))
    model.save_pretrained(tmp_path / "small")
    return model, tmp_path / "small"


def run(code: str, folder) -> subprocess.CompletedProcess:
    """A process that has not imported hf_slim."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder.parent / "modules")}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_slim_folder_carries_two_lines_that_name_the_version(made):
    _, folder = made
    lines = (folder / FILE).read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("import hf_slim")
    assert "hf_slim>=0.3" in lines[0]
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hf_slim.AutoModelForCausalLM"
    assert config["quantization_config"]["requires"] == "hf_slim>=0.3"


def test_a_loaded_model_carries_them_on(made, tmp_path):
    _, folder = made
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in (FILE, "config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_other_folders_carry_none(tmp_path):
    model = convert(prepare(plain_model("llama"), QuantizationConfig("w8a16")))
    model.save_pretrained(tmp_path / "standard")
    save_as_(model, "slim")
    model.save_pretrained(tmp_path / "slim")
    save_as_(model, "gemma")
    model.save_pretrained(tmp_path / "gemma")
    training = prepare(plain_model("llama"), QuantizationConfig("w8a16"))
    training.save_pretrained(tmp_path / "training")
    assert [path.parent.name for path in tmp_path.rglob(FILE)] == ["slim"]
    for name in ("standard", "gemma", "training"):
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())


def test_code_of_the_model_itself_is_left_alone(tmp_path):
    model = plain_model("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    convert(prepare(model, *SLIM["packed"])).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoModelForCausalLM": "modeling_own.Own"
    }
    assert not (tmp_path / FILE).exists()


@pytest.mark.slow
def test_trust_remote_code_loads_it_without_an_import(made):
    model, folder = made
    save_file({"input_ids": tiny.tokens()}, folder / "inputs.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
folder = sys.argv[1]
AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model) is LlamaForCausalLM
assert LlamaForCausalLM._auto_class is None
with torch.no_grad():
    save_file({"logits": model(**load_file(f"{folder}/inputs.safetensors")).logits}, f"{folder}/logits.safetensors")
"""
    found = run(code, folder)
    assert found.returncode == 0, found.stderr[-3000:]
    assert torch.equal(load_file(folder / "logits.safetensors")["logits"], tiny.logits(model))


@pytest.mark.slow
def test_without_hf_slim_a_slim_folder_fails_loudly(made):
    _, folder = made
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    found = run(code, folder)
    assert found.returncode != 0
    assert "hf_slim" in found.stderr
