"""Which folders count as finished models, and what is said of the others."""

import json
from pathlib import Path

import pytest

from hf_slim import SlimLoadError, push
from hf_slim.hub.folder import auto_class, read_folder
from tests import tiny
from tests.hub.conftest import save_model, shard_

REPO = "me/small"


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif how == "no weights":
        weights.unlink()
    elif how == "a shard is missing":
        shard_(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "a checkpoint":
        (folder / "optimizer.pt").write_bytes(b"moments")
    elif how == "float masters":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["mode"] = "qat"
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "another model's report":
        tiny.llama(seed=9).save_pretrained(folder)
    elif how == "a damaged report":
        (folder / "report.json").write_text('{"title": ')
    elif how == "no report at all":
        (folder / "report.json").write_text('{"accuracy": 1}')


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut short", "is damaged"), ("no weights", "lacks model.safetensors"),
        ("a shard is missing", "lacks model-00002"), ("no config", "no config.json"), ("a checkpoint", "a checkpoint"),
        ("float masters", "a checkpoint"), ("another model's report", "other weights"),
        ("a damaged report", "cannot be read"), ("no report at all", "is no report"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_finished_is_refused_before_anything_is_asked(how, says, hub, folder):
    damage(folder, how)
    with pytest.raises(SlimLoadError, match=says):
        push(folder, REPO)
    assert not hub.requests
    with pytest.raises(SlimLoadError, match="does not exist"):
        push(folder / "nothing", REPO)


def test_a_checkpoint_is_known_by_its_name_where_it_has_no_optimizer(tmp_path):
    for name, is_finished in (("checkpoint-8", False), ("small", True)):
        folder = save_model(tmp_path / name)
        (folder / "trainer_state.json").write_text("{}")  # `trainer.save_state` leaves one beside finished models too
        if is_finished:
            assert "trainer_state.json" in read_folder(folder).left_out
        else:
            with pytest.raises(SlimLoadError, match="a checkpoint"):
                read_folder(folder)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("GPT2LMHeadModel", "GPT2LMHeadModel"),
        ("T5ForConditionalGeneration", "T5ForConditionalGeneration"),
    ],
)
def test_an_auto_class_loads_a_model_where_there_is_one(architecture, name):
    assert auto_class({"architectures": [architecture]}) == name
