"""An edited `quantization_config` makes other values of the same bytes, and is refused unless the edit is meant."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_slim import PruningConfig, QuantizationConfig, SlimLoadError, convert, prepare
from hf_slim.integration.loading import load_model
from hf_slim.integration.trust.checksums import KEY, check_checksums, checksums
from tests import tiny
from tests.damage import edit_json, fuzzing

PRUNED = PruningConfig(sparsity={"ffn": 0.4, "kv_heads": 0.34}, uniform=False, criterion="l2")
PACKED = QuantizationConfig("w4a16", group_size=16, embeddings="w8a16")
FORMS = {"packed": [PACKED], "pruned": [PRUNED], "pruned and packed": [PRUNED, PACKED]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, configs in FORMS.items():
        made[name] = tmp_path_factory.mktemp("folder")
        convert(prepare(tiny.llama(), *configs)).save_pretrained(made[name])
    made["training"] = tmp_path_factory.mktemp("folder")
    prepare(tiny.llama(), PACKED).save_pretrained(made["training"])
    return made


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def write(folder, change):
    config = json.loads((folder / "config.json").read_text())
    whole = json.dumps(config)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return whole


@pytest.mark.parametrize("name", [*FORMS, "training"])
def test_every_form_carries_checksums_that_survive_loading_and_saving(folders, name, tmp_path):
    config = json.loads((folders[name] / "config.json").read_text())
    assert config[KEY] == checksums(config["quantization_config"])
    AutoModelForCausalLM.from_pretrained(folders[name]).save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert again["quantization_config"] == config["quantization_config"]
    assert again[KEY] == config[KEY]


def test_a_model_that_becomes_plain_again_carries_none(tmp_path):
    config = PruningConfig(sparsity={"ffn": 0.5}, criterion="l2")
    convert(prepare(tiny.llama(), config)).save_pretrained(tmp_path)
    assert not {KEY, "quantization_config"} & json.loads((tmp_path / "config.json").read_text()).keys()


EDITS = {
    "bits": ("layers", "w4a16-g16", "w8a16-g16"),
    "zero point": ("layers", "w4a16-g16", "w4a16-g16-asym"),
    "unsigned codes": ("layers", "w4a16-g16", "w4a16-g16-unsigned"),
    "floor": ("layers", "w4a16-g16", "w4a16-g16-floor"),
    "another grid": ("layers", "w4a16-g16", {"weights": {"kind": "nf4", "granularity": "group", "group_size": 16}}),
    "a fixed scale": ("layers", "w4a16-g16", {"weights": {"bits": 4, "scale": 0.5}}),
    "another input": ("layers", "w4a16-g16", "w4a8-g16"),
    "group size": ("layers", "w4a16-g16", "w4a16-g32"),
}


@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_scheme_is_refused_with_what_differs(folders, edit, load):
    key, old, new = EDITS[edit]

    def change(config):
        layers = config["quantization_config"][key]
        layers.update({path: new for path, scheme in layers.items() if scheme == old})

    whole = write(folders["packed"], change)
    try:
        with pytest.raises(SlimLoadError, match=rf"`layers` is .* remove `{KEY}`"):
            load(str(folders["packed"]))
    finally:
        (folders["packed"] / "config.json").write_text(whole)


def test_an_edit_that_is_meant_loads_once_the_checksums_are_removed(folders):
    def change(config):
        layers = config["quantization_config"]["layers"]
        layers.update({path: "w4a16-g16-floor" for path, scheme in layers.items() if scheme == "w4a16-g16"})
        del config[KEY]

    whole = write(folders["packed"], change)
    try:
        loaded = load_model(str(folders["packed"]))
    finally:
        (folders["packed"] / "config.json").write_text(whole)
    assert str(loaded.model.layers[0].mlp.up_proj.scheme) == "w4a16-g16-floor"
    assert torch.equal(
        tiny.logits(loaded), tiny.logits(load_model(str(folders["packed"])))
    )  # codes are rounded already


@fuzzing(100, share=0.1)
@given(data=st.data(), name=st.sampled_from([*FORMS, "training"]))
def test_any_other_json_has_other_checksums(folders, data, name):
    settings = settings_of(folders[name])
    edited = edit_json(data.draw, settings)
    written = checksums(settings)
    same = json.dumps(edited, sort_keys=True) == json.dumps(settings, sort_keys=True)
    if same:
        check_checksums(edited, written)
    else:
        with pytest.raises(SlimLoadError, match="is not what hf_slim wrote"):
            check_checksums(edited, written)


def test_order_does_not_matter_and_their_type_does(folders):
    settings = settings_of(folders["packed"])
    check_checksums(dict(reversed(settings.items())), checksums(settings))
    for written in ([], "x", {"layers": 3}, {}):
        with pytest.raises(SlimLoadError, match=KEY):
            check_checksums(settings, written)
