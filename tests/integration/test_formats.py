"""Folders of every format that hf_slim has ever written load, and say what they said when they were written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_slim import SlimError
from hf_slim.integration.format_version import FORMAT_VERSION
from hf_slim.integration.hf_quantizer import HfSlimConfig
from tests.fixtures.make_formats import made

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"
FOLDERS = sorted(path.name for path in FORMATS.iterdir())
REFUSED = ["1-packed-groups"]
# 0.1 divided by the scale, and since 0.2 its reciprocal is multiplied: the largest value of a slice lies half-way
# between two steps, and may round to the other one
ROUNDED_OTHERWISE = {"1-packed": 0.05, "1-training": 0.15}


def expected(name: str) -> dict:
    return json.loads((FORMATS / name / "logits.json").read_text())


def loaded(name: str, folder: Path | None = None) -> torch.nn.Module:
    model_class = getattr(transformers, expected(name)["class"])
    model, found = model_class.from_pretrained(folder or FORMATS / name, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


@torch.no_grad()
def difference(name: str, model: torch.nn.Module) -> float:
    """The largest difference to the logits of then."""
    wanted = expected(name)
    found = model(input_ids=torch.tensor(wanted["input_ids"])).logits.flatten(0, -2)
    return (found - torch.tensor(wanted["logits"])).abs().max().item()


def test_every_format_has_its_folders():
    assert {int(name[0]) for name in FOLDERS} == set(range(1, FORMAT_VERSION + 1))
    assert len(FOLDERS) == 15


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in REFUSED])
def test_a_folder_says_what_it_said_when_it_was_written(name, tmp_path):
    model = loaded(name)
    allowed = ROUNDED_OTHERWISE.get(name, 1e-5)
    assert difference(name, model) < allowed
    if "pruned" in name:
        assert model.config.quantization_config.shapes
    assert model.config.quantization_config.format_version == int(name[0])
    model.save_pretrained(tmp_path)
    again = loaded(name, tmp_path)
    assert again.config.quantization_config.format_version == model.config.quantization_config.format_version
    assert difference(name, again) < allowed


@pytest.mark.parametrize("name", [name for name in FOLDERS if name.endswith("training")])
def test_masters_are_those_that_were_saved(name):
    model, saved = loaded(name), load_file(FORMATS / name / "model.safetensors")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in saved.items())


def test_groups_that_format_1_packed_are_refused():
    with pytest.raises(SlimError, match=r"packed by hf_slim 0\.1\.0.*Pack it again"):
        loaded("1-packed-groups")


@pytest.mark.parametrize("name", ["pruned-packed", "training"])
def test_a_format_that_changes_gets_a_new_number(name, tmp_path):
    """If this fails on purpose: raise FORMAT_VERSION, describe the format, and commit folders of it."""
    made(name).save_pretrained(tmp_path)
    folders = (FORMATS / f"{FORMAT_VERSION}-{name}", tmp_path)
    then, now = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in folders)
    assert now["format_version"] == then["format_version"] == FORMAT_VERSION
    assert now.keys() - {"requires"} == then.keys()
    assert [now[key] for key in ("mode", "layers")] == [then[key] for key in ("mode", "layers")]
    assert [now[key].keys() for key in ("shapes", "attributes")] == [
        then[key].keys() for key in ("shapes", "attributes")
    ]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert {key: tensor.dtype for key, tensor in weights[0].items()} == {
        key: tensor.dtype for key, tensor in weights[1].items()
    }


def changed(folder: Path, **settings: object) -> Path:
    """A copy of a folder whose config.json says something else."""
    shutil.copytree(FORMATS / f"{FORMAT_VERSION}-pruned-packed", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_newer_format_names_the_version_that_reads_it(tmp_path):
    folder = changed(tmp_path / "new", format_version=FORMAT_VERSION + 1, version="7.5.0", mode="melted", more=1)
    with pytest.raises(SlimError, match=rf"format {FORMAT_VERSION + 1} .*7\.5\.0.*Install hf_slim 7\.5\.0 or newer"):
        transformers.LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("value", ["3", 0, 2.0, True])
def test_a_format_that_is_no_number_is_refused(value, tmp_path):
    with pytest.raises(SlimError, match="whole number from 1"):
        transformers.LlamaForCausalLM.from_pretrained(changed(tmp_path / "odd", format_version=value))


@pytest.mark.parametrize(
    ("version", "shapes", "number"),
    [("0.1.0", {"a": [1, 2]}, 1), ("0.2.0", {"a": [1, 2]}, 2), ("0.2.0", {"a.weight": [1, 2]}, 3), ("", {}, 2)],
)
def test_a_folder_without_a_number_has_the_format_that_the_rest_says(version, shapes, number):
    assert HfSlimConfig("pruned", shapes, version=version).format_version == number
