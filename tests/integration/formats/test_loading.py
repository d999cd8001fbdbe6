"""Folders in formats of other libraries, loaded after `import hf_slim`."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.gemma_quant import QuantizedLinear
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig
from transformers.utils.quantization_config import GemmaQuantizationConfig

from hf_slim import QuantizationConfig, convert, prepare
from hf_slim.integration.hf_quantizer import MARK, OTHER_METHODS, HfSlimConfig
from hf_slim.quantization.layers.packed import PackedEmbedding, PackedLinear
from tests import tiny
from tests.integration.formats.cells import plain_model, written

CONFIGS = {
    "compressed-tensors": QuantizationConfig("w4a16-g16"),
    "gemma": QuantizationConfig("w4a16", embeddings="w8a16"),
    "bitsandbytes": QuantizationConfig("nf4-g32"),
    "slim": QuantizationConfig("codebook3"),
}
STANDARD = [name for name in CONFIGS if name != "slim"]


@pytest.fixture(params=STANDARD)
def made(request, tmp_path):
    model = convert(prepare(plain_model("llama"), CONFIGS[request.param]))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "small")
    return model, tmp_path / "small"


def saved_config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_config_json_is_that_of_the_other_library_with_a_mark(made):
    model, folder = made
    saved = saved_config(folder)
    name = model.config.quantization_config.save_format
    assert saved["quant_method"] == name
    assert saved[MARK]["mode"] == "packed"
    assert saved[MARK]["requires"] == "hf_slim>=0.3"
    assert QuantizationConfig.from_dict(saved[MARK]["techniques"]["quantization"]) == CONFIGS[name]
    assert saved[MARK]["layers"].keys() == model.config.quantization_config.layers.keys()


def test_layers_are_packed_and_hold_the_same_codes(made):
    model, folder = made
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, PackedLinear)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_switch_leaves_a_folder_to_transformers(monkeypatch, tmp_path):
    convert(prepare(plain_model("llama"), CONFIGS["gemma"])).save_pretrained(tmp_path)
    monkeypatch.setenv("HF_SLIM_PACKED", "0")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model.config.quantization_config) is GemmaQuantizationConfig
    assert type(model.model.layers[0].mlp.up_proj) is QuantizedLinear
    monkeypatch.setenv("HF_SLIM_PACKED", "1")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ours.config.quantization_config) is HfSlimConfig
    assert torch.equal(tiny.logits(ours), tiny.logits(model))


def test_folders_without_our_mark_are_left_to_transformers(tmp_path):
    convert(prepare(plain_model("llama"), CONFIGS["gemma"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"][MARK]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model.config.quantization_config) is GemmaQuantizationConfig


def test_config_classes_of_transformers_stay_what_they_were():
    settings = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    assert type(AutoQuantizationConfig.from_dict(settings)) is BitsAndBytesConfig
    for method in OTHER_METHODS:
        known = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        assert issubclass(known, known.__mro__[1])
        assert known.__name__ == known.__mro__[1].__name__


def test_reading_needs_no_package_of_the_format(made, monkeypatch):
    model, folder = made
    for package in ("compressed_tensors", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(folder)), tiny.logits(model))


def test_the_base_model_alone_loads(made):
    model, folder = made
    base, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert isinstance(base.layers[0].mlp.up_proj, PackedLinear)
    hidden = base(input_ids=tiny.tokens()).last_hidden_state
    with torch.no_grad():
        assert torch.equal(hidden, model.model(input_ids=tiny.tokens()).last_hidden_state)


def test_shards_load_and_save_again(made, tmp_path):
    model, _ = made
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    loaded.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert written(tmp_path / "again") == written(tmp_path / "sharded")


ON_DISK = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize("device_map", ["cpu", "auto", ON_DISK | {"lm_head": "cpu"}], ids=["cpu", "auto", "disk"])
def test_device_maps(made, device_map, tmp_path):
    model, folder = made
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tiny.tokens()).logits, tiny.logits(model))


def test_another_dtype_keeps_codes_and_scales(made):
    model, folder = made
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    layer, own = loaded.model.layers[1].self_attn.q_proj, model.model.layers[1].self_attn.q_proj
    assert torch.equal(layer.weight, own.weight)
    assert torch.equal(layer.weight_scale, own.weight_scale)
    assert layer.weight_scale.dtype == own.weight_scale.dtype
    assert loaded.model.norm.weight.dtype == torch.bfloat16


def test_a_config_that_was_read_before_serves_too(made):
    model, folder = made
    config = AutoConfig.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_a_tied_head_that_is_stored_twice_is_held_once(tmp_path):
    model = convert(prepare(plain_model("llama", tied=True), CONFIGS["gemma"]))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {"model.embed_tokens.embedding_quantized", "lm_head.weight"} <= stored.keys()
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight_scale is loaded.model.embed_tokens.weight_scale


def test_adapters_go_on_top_and_are_saved_alone(made, tmp_path):
    peft = pytest.importorskip("peft")
    _, folder = made
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    try:
        loaded.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    except ValueError as error:
        pytest.skip(str(error))  # transformers wants another version of PEFT
    loaded.save_pretrained(tmp_path / "adapter")
    assert all("lora" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(loaded))


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a16"])
def test_static_scales_of_activations_are_written(scheme, tmp_path):
    model = prepare(plain_model("llama"), QuantizationConfig(scheme)).train()
    for seed in range(9):
        model(input_ids=tiny.tokens(seed=seed))
    model = convert(model.eval())
    for name in ("compressed-tensors", "gemma"):
        loaded = saved_and_loaded(model, name, tmp_path / name)
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def saved_and_loaded(model: PreTrainedModel, name: str, folder) -> PreTrainedModel:
    from hf_slim.integration.config_json import save_as_

    save_as_(model, name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def test_a_model_can_change_its_format_again_and_again(tmp_path):
    model = convert(prepare(plain_model("llama", tied=True), QuantizationConfig("w8a16", embeddings="w8a16")))
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path / "0")
    for number, name in enumerate(("slim", "gemma", "slim", "gemma"), start=1):
        model = saved_and_loaded(model, name, tmp_path / str(number))
        assert torch.equal(tiny.logits(model), expected)
    assert written(tmp_path / "4") == written(tmp_path / "2") == written(tmp_path / "0")
    assert written(tmp_path / "3") == written(tmp_path / "1")
    shutil.rmtree(tmp_path / "0")
