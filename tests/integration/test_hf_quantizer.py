import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_slim import PruningConfig, QuantizationConfig, SlimError, convert, prepare
from hf_slim.integration.hf_quantizer import HfSlimConfig, register
from hf_slim.quantization.layers.training import FakeQuantLinear
from tests import tiny

PRUNED = PruningConfig(sparsity={"ffn": 0.4, "kv_heads": 0.34}, uniform=False, criterion="l2")
MADE = {
    "pruned": [PRUNED],
    "packed": [QuantizationConfig("w8a8", embeddings="w8a8")],
    "pruned and packed": [PRUNED, QuantizationConfig("w4a16", group_size=16, embeddings="w8a16")],
}


@pytest.fixture(params=list(MADE))
def made(request, tmp_path):
    model = convert(prepare(tiny.llama(), *MADE[request.param]))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "small")
    return model, tmp_path / "small"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("configs", list(MADE))
def test_what_was_saved_loads_bit_for_bit(configs, tied, dtype, tmp_path):
    tiny.llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)  # `.to` would narrow rotary buffers
    model = convert(prepare(base, *MADE[configs]))
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.dtype == dtype
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


@pytest.mark.parametrize("configs", list(MADE))
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert_mlm"])
def test_loading_misses_nothing_and_finds_nothing_unexpected(configs, family, tmp_path):
    model = convert(prepare(tiny.FAMILIES[family](), *MADE[configs]))
    model.save_pretrained(tmp_path)
    loaded, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_shards_load_too(made, tmp_path):
    model, _ = made
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")), tiny.logits(model))


def test_a_tied_embedding_is_stored_once(tmp_path):
    convert(prepare(tiny.llama(), *MADE["packed"])).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith("lm_head")]  # noqa: SIM118
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.int8


def test_generation_pipeline_and_beams_work_after_loading(made):
    _, folder = made
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = tiny.tokens(2)
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with_cache = loaded.generate(ids, **arguments)
    assert torch.equal(loaded.generate(ids, use_cache=False, **arguments), with_cache)
    assert loaded.generate(ids, num_beams=2, **arguments).shape == with_cache.shape
    say = pipeline("text-generation", model=loaded, tokenizer=tiny.tokenizer())
    assert say("abc", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("a")


def test_a_checkpoint_in_training_form_loads_in_training_form(tmp_path):
    model = prepare(tiny.llama(), *MADE["packed"])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["mode"] == "qat"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, FakeQuantLinear)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert loaded.model.layers[0].mlp.up_proj.weight.requires_grad
    loaded.train()(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert torch.equal(tiny.logits(convert(loaded)), tiny.logits(convert(model)))


def test_a_small_model_can_be_made_smaller_again(tmp_path):
    convert(prepare(tiny.llama(), PRUNED)).save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    convert(prepare(again, PruningConfig(sparsity={"ffn": 0.3}, uniform=False, criterion="l1"), *MADE["packed"]))
    again.save_pretrained(tmp_path / "twice")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(tiny.logits(loaded), tiny.logits(again))
    config = json.loads((tmp_path / "twice" / "config.json").read_text())["quantization_config"]
    assert config["mode"] == "packed"
    assert config["techniques"].keys() == {"pruning", "quantization"}


def test_quantizing_a_pruned_checkpoint_remembers_the_pruning(tmp_path):
    convert(prepare(tiny.llama(), PRUNED)).save_pretrained(tmp_path / "pruned")
    model = prepare(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), *MADE["packed"])
    model.save_pretrained(tmp_path / "training")
    model = convert(AutoModelForCausalLM.from_pretrained(tmp_path / "training"))
    assert model.config.quantization_config.techniques["pruning"] == PRUNED.to_dict()
    assert model.config.quantization_config.techniques["quantization"] == MADE["packed"][0].to_dict()


def test_an_unknown_mode_names_the_version(tmp_path):
    convert(prepare(tiny.llama(), PRUNED)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["mode"] = "dissolved"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlimError, match="Install a newer hf_slim"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_groups_that_an_older_version_packed_are_refused():
    with pytest.raises(SlimError, match="Pack it again"):
        HfSlimConfig("packed", layers={"a": "w4a16-g32"}, version="0.1.0")
    assert HfSlimConfig("packed", layers={"a": "w8a8"}, version="0.1.0").mode == "packed"


def test_registering_twice_is_harmless():
    tables = (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    register()
    register()
    assert [dict(table) for table in tables] == before
    assert AUTO_QUANTIZER_MAPPING["hf_slim"].__name__ == "HfSlimQuantizer"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["hf_slim"] is HfSlimConfig


def test_trainer_refuses_to_train_integers(made, tmp_path):
    model, folder = made
    if any(tensor.dtype == torch.int8 for tensor in model.state_dict().values()):
        with pytest.raises(ValueError, match="purely quantized"):
            tiny.trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run", [])
    else:
        tiny.trainer(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run", []).train()
