import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig, MambaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_slim import DistillationCallback, QuantizationCallback, QuantizationConfig, SlimError, convert, prepare
from hf_slim.core.modules import plain_copy
from hf_slim.integration.kv_cache import QuantizedLayer, cache_argument, cache_of
from hf_slim.quantization.grids.fake_quant import fake_quantize_tokens
from tests import tiny

GENERATE = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def decoder(family="llama", bits="int8"):
    return prepare(tiny.ALL_FAMILIES[family](), QuantizationConfig("w8a16", kv_cache=bits)).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_decoding_with_the_cache_sees_what_training_saw(family, bits):
    model = decoder(family, bits)
    ids = tiny.tokens()
    with torch.enable_grad():
        trained = model(input_ids=ids, use_cache=False).logits  # rounding keys and values on the way
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        second = model(input_ids=ids[:, :1], use_cache=True, **{cache_argument(model): cache_of(first)})
    assert torch.equal(first.logits, trained)
    assert all(isinstance(layer, QuantizedLayer) for layer in cache_of(second).layers)
    assert cache_of(second).get_seq_length() == ids.shape[1] + 1
    without = tiny.logits(prepare(tiny.ALL_FAMILIES[family](), QuantizationConfig("w8a16")), ids)
    assert not torch.equal(trained, without)


def test_the_cache_is_found_under_the_name_that_a_forward_gives_it():
    class Since524(nn.Module):
        def forward(self, input_ids, cache=None, **kwargs):
            return {"logits": None, "cache": cache}

    class Before(nn.Module):
        def forward(self, input_ids, past_key_values=None):
            return {"past_key_values": past_key_values}

    for model, name in ((Since524(), "cache"), (Before(), "past_key_values"), (nn.Linear(1, 1), None)):
        assert cache_argument(model) == name
        if name is not None:
            cache = DynamicCache()
            assert cache_of(model(input_ids=None, **{name: cache})) is cache
    assert cache_of({"logits": None}) is None


def test_a_decoder_that_is_called_with_the_older_name_fills_codes_too():
    model = decoder()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(input_ids=tiny.tokens(), past_key_values=cache, use_cache=True)
    assert all(isinstance(layer, QuantizedLayer) for layer in cache.layers)
    assert cache.get_seq_length() == tiny.tokens().shape[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_gives_back_what_training_rounds_to(bits):
    layer, states = QuantizedLayer(bits), torch.randn(2, 3, 7, 10)
    for start, end in ((0, 4), (4, 5), (5, 7)):
        keys, values = layer.update(states[:, :, start:end], -states[:, :, start:end])
    rounded = fake_quantize_tokens(states, layer.grid)
    assert torch.equal(keys, rounded)
    assert torch.equal(values, fake_quantize_tokens(-states, layer.grid))


@pytest.mark.parametrize(("bits", "share"), [("int8", (8 + 4) / 32), ("int4", (4 + 4) / 32)])
def test_the_cache_really_is_smaller(bits, share):
    model = decoder(bits=bits)
    with torch.no_grad():
        cache = cache_of(model(input_ids=tiny.tokens(), use_cache=True))
    stored = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    floats = 2 * 3 * 4 * 3 * 12 * 8 * 4  # keys and values, layers, batch, heads, tokens, head size, bytes
    assert stored == floats * share


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_works_as_ever(how, tmp_path):
    model = convert(decoder())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny.tokens(2, 6)
    expected = model.generate(ids, **GENERATE, **how)
    assert torch.equal(loaded.generate(ids, **GENERATE, **how), expected)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_training_rounds_and_gradients_pass(monkeypatch):
    """Against attention that rounds its keys and values itself, with a straight-through gradient."""
    model = decoder(bits="int4")
    reference = prepare(tiny.llama(), QuantizationConfig("w8a16")).eval()
    reference.load_state_dict(model.state_dict())
    ids, attend, grid = tiny.tokens(), ALL_ATTENTION_FUNCTIONS["sdpa"], QuantizedLayer(4).grid
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def straight_through(states):
        return states + (fake_quantize_tokens(states.detach(), grid) - states.detach())

    def rounding(module, query, key, value, *args, **kwargs):
        return attend(module, query, straight_through(key), straight_through(value), *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", rounding)
    reference(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert expected["model.layers.0.self_attn.k_proj.weight"].norm() > 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_model_trained_with_a_rounded_cache_loads_as_it_was(tmp_path):
    model = tiny.llama()
    tiny.trainer(model, tmp_path, [QuantizationCallback({"scheme": "w8a8", "kv_cache": "int4"})]).train()
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_teacher_keeps_its_cache_in_float(order, tmp_path):
    callbacks = [DistillationCallback({"teacher": "self"}), QuantizationCallback({"kv_cache": "int4"})]
    untouched = tiny.logits(tiny.llama())
    model = tiny.llama()
    tiny.trainer(model, tmp_path, [callbacks[index] for index in order])
    assert torch.equal(tiny.logits(plain_copy(model)), untouched)


@pytest.mark.parametrize(
    ("family", "says"), [("bert", "has no such cache"), ("t5", "has no such cache"), ("vit", "has no such cache")]
)
def test_a_model_without_such_a_cache_is_refused(family, says):
    with pytest.raises(SlimError, match=says):
        prepare(tiny.ALL_FAMILIES[family](), QuantizationConfig("w8a16", kv_cache="int8"))


def test_a_model_with_a_state_of_fixed_size_is_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=48, num_hidden_layers=2, state_size=8))
    with pytest.raises(SlimError, match="layers of linear_attention"):  # takes a `cache` since transformers 5.24
        prepare(mamba, QuantizationConfig("w8a16", kv_cache="int8"))


def test_another_kind_of_cache_is_refused():
    with pytest.raises(SlimError, match="empty DynamicCache; got StaticCache"):
        decoder().generate(tiny.tokens(2, 6), cache_implementation="static", **GENERATE)


def test_gradient_checkpointing_is_refused(tmp_path):
    callback = QuantizationCallback({"kv_cache": "int8"})
    with pytest.raises(SlimError, match="Gradient checkpointing disables the key-value cache"):
        tiny.trainer(tiny.llama(), tmp_path, [callback], gradient_checkpointing=True).train()
