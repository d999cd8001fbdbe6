import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_slim import QuantizationCallback, QuantizationConfig, convert, prepare
from hf_slim.quantization.plan import plan_quantization
from hf_slim.quantization.transform import quantized_layers
from tests import tiny

peft = pytest.importorskip("peft", reason="adapters are PEFT's: pip install peft")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def with_lora(model, **changes):
    settings = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | changes
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g16", "nf4-g16", "codebook3"])
def test_training_sees_the_merged_weight_that_ships(scheme, monkeypatch):
    tiny.only_reference_kernels(monkeypatch)
    config = QuantizationConfig(scheme)
    trained = prepare(with_lora(tiny.llama()), config)
    seen = tiny.logits(trained)
    merged = with_lora(tiny.llama()).merge_and_unload()
    plain = tiny.logits(prepare(merged, config)) if scheme != "codebook3" else None
    small = convert(trained)
    assert torch.equal(tiny.logits(small), seen)
    assert not any("lora" in name for name in small.state_dict())
    if plain is not None:  # a codebook was fitted to the base before the adapter moved it
        torch.testing.assert_close(seen, plain, rtol=1e-3, atol=1e-3)


def test_gradients_reach_the_adapters_and_nothing_else(tmp_path):
    model = with_lora(tiny.llama())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tiny.trainer(model, tmp_path, [QuantizationCallback({"scheme": "w4a16-g16"})], tiny.text_data()).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    small = convert(model)
    assert "model.layers.0.self_attn.q_proj" in quantized_layers(small)
    small.save_pretrained(tmp_path / "small")
    loaded = type(small).from_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(loaded), tiny.logits(small))


def test_a_disabled_adapter_does_not_count():
    config = QuantizationConfig("w8a16")
    model = prepare(with_lora(tiny.llama()), config)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(prepare(tiny.llama(), config)))


def test_adapters_themselves_are_not_quantized():
    model = with_lora(tiny.llama())
    reasons = {p.name: p.reason for p in plan_quantization(model.get_base_model(), QuantizationConfig("w8a8"))}
    assert reasons["model.layers.0.self_attn.q_proj.lora_A.default"] == "part of an adapter"
    assert not reasons["model.layers.0.self_attn.q_proj.base_layer"]


def test_what_peft_has_merged_is_packed_as_well(monkeypatch):
    tiny.only_reference_kernels(monkeypatch)
    trained = prepare(with_lora(tiny.llama()), QuantizationConfig("w8a8"))
    seen = tiny.logits(trained)
    assert torch.equal(tiny.logits(convert(trained.merge_and_unload())), seen)


@pytest.mark.parametrize("scheme", ["nf4-g16", "w4a16-g16"])
def test_qlora_trains_and_its_merged_weights_are_packed(scheme, tmp_path, monkeypatch):
    tiny.only_reference_kernels(monkeypatch)
    tiny.llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits)
    model = with_lora(base)
    seen = []
    trainer = tiny.trainer(model, tmp_path, [QuantizationCallback({"scheme": scheme})], tiny.text_data())
    trainer.add_callback(tiny.EveryStep(lambda model: seen.append(tiny.logits(model))))
    trainer.train()
    assert not torch.equal(seen[0], seen[-1])
    small = convert(model)
    assert torch.equal(tiny.logits(small), seen[-1])
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), seen[-1])
