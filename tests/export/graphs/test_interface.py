"""What models are called with: caches for decoders, and never a size that would become a constant of the graph."""

import pytest
import torch
from transformers import LlamaForSequenceClassification

from hf_slim import QuantizationConfig, SlimError, convert, prepare
from hf_slim.export.graphs.interface import (
    Interface,
    continued,
    empty_cache,
    example,
    fresh,
    interface_from,
    interface_of,
)
from hf_slim.integration.kv_cache import cache_argument, cache_of, quantize_kv_cache_
from tests import tiny


def decoder() -> tuple:
    model = tiny.llama().eval()
    return model, interface_of(model, None)


def test_decoders_have_a_cache_and_encoders_have_none():
    model, interface = decoder()
    assert interface == Interface(("input_ids", "attention_mask", "position_ids"), cache_argument(model))
    assert interface_of(tiny.bert(), None) == Interface(("input_ids", "attention_mask", "token_type_ids"))
    assert interface_of(tiny.vit(), None) == Interface(("pixel_values",))


def test_inputs_that_the_tokenizer_does_not_make_are_left_out():
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert interface_of(tiny.bert(), tokenizer).names == ("input_ids", "attention_mask")


def test_the_interface_of_a_graph_is_read_from_its_names():
    model, interface = decoder()
    assert interface_from([*interface.names, interface.cache], model) == interface
    assert interface_from(["input_ids"], model) == Interface(("input_ids",))


def test_encoder_decoders_are_refused():
    with pytest.raises(SlimError, match="encoder-decoder"):
        interface_of(tiny.t5(), None)


def test_a_cache_on_a_grid_is_refused():
    model = tiny.llama()
    convert(prepare(model, QuantizationConfig(scheme="w8a8", kv_cache="int8")))
    quantize_kv_cache_(model)
    with pytest.raises(SlimError, match="kv_cache: null"):
        interface_of(model, None)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_sizes_of_the_example_differ_and_a_row_is_padded(name):
    model = tiny.ALL_FAMILIES[name]().eval()
    interface = interface_of(model, None)
    inputs = example(model, interface)
    mask = inputs["attention_mask"]
    rows, total = mask.shape
    sizes = [rows, total] + ([inputs["input_ids"].shape[1]] if interface.cache else [])
    assert len(set(sizes)) == len(sizes)
    assert min(sizes) > 1
    assert mask[0].all()
    assert not mask[1].all()
    assert mask[1, -1 if interface.cache else 0] == 1


def test_a_classifier_on_a_decoder_runs_without_a_cache():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny.llama(pad_token_id=0).config).eval()
    interface = interface_of(model, None)
    assert interface.cache is None
    assert example(model, interface)["use_cache"] is False


def test_tokens_after_a_cache_give_what_the_whole_text_gives():
    model, interface = decoder()
    whole = fresh(model, interface, 3, 9)
    first = {name: value[:, :5] for name, value in whole.items()}
    with torch.no_grad():
        outputs = model(**first, use_cache=True)
        following = continued(interface, first, whole["input_ids"][:, 5:])
        found = model(**following, **{interface.cache: cache_of(outputs)}).logits
        expected = model(**whole).logits[:, 5:]
    assert torch.equal(following["attention_mask"], whole["attention_mask"])
    torch.testing.assert_close(found, expected)


def test_an_empty_cache_has_its_tensors_and_no_tokens():
    model, interface = decoder()
    cache = empty_cache(model, 3)
    assert [layer.keys.shape for layer in cache.layers] == [(3, 3, 0, 8)] * 3
    inputs = fresh(model, interface, 3, 9)
    with torch.no_grad():
        with_cache = model(**inputs, **{interface.cache: cache}).logits
    torch.testing.assert_close(with_cache, model(**inputs).logits)


def test_token_types_are_not_all_the_same():
    model = tiny.bert()
    inputs = fresh(model, interface_of(model, None), 2, 8)
    assert set(inputs["token_type_ids"].flatten().tolist()) == {0, 1}
