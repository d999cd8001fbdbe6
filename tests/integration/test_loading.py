from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification as CLASSIFIER
from transformers import BertModel, LlamaForCausalLM

from hf_slim import QuantizationConfig, SlimLoadError, convert, prepare
from hf_slim.integration import rebuild
from hf_slim.integration.loading import class_of, lacks_head, load_model, load_skeleton, load_tokenizer, located
from tests import tiny
from tests.core.test_errors import as_ours


def test_a_model_loads_from_its_folder(tmp_path):
    assert torch.equal(tiny.logits(load_model(str(tiny.save_base(tmp_path)))), tiny.logits(tiny.llama()))


def test_a_checkpoint_without_some_weights_is_refused_and_not_filled_with_noise(tmp_path):
    file = tiny.save_base(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SlimLoadError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("package:json/nothing.bin", "has no file 'nothing.bin'"),
        ("package:not a module/x", "package:<module>/<file>"),
        ("/no/such/folder", "does not exist"),
        ("nowhere.gguf", "does not exist"),
    ],
)
def test_a_place_that_does_not_exist_is_named(spec, says):
    with pytest.raises(SlimLoadError, match=says):
        located(spec)


@pytest.fixture
def encoder(tmp_path):
    """An encoder without a head, as sentence encoders are shipped."""
    tiny.bert().bert.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_a_fresh_head_has_the_classes_that_are_asked_for(encoder):
    assert lacks_head(encoder, CLASSIFIER)
    model = load_model(encoder, auto_class=CLASSIFIER, label_names=["bad", "good"])
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.classifier.out_features == 2
    assert torch.equal(model.bert.pooler.dense.weight, tiny.bert().bert.pooler.dense.weight)
    assert load_skeleton(encoder, CLASSIFIER, ["a", "b", "c", "d"]).classifier.out_features == 4
    with pytest.raises(SlimLoadError, match=r"lacks 2 weights.*head was never trained"):
        load_model(encoder, auto_class=CLASSIFIER)


def test_a_trained_head_is_kept_with_its_names(tmp_path):
    trained = tiny.bert(id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    trained.save_pretrained(tmp_path)
    assert not lacks_head(str(tmp_path), CLASSIFIER)
    model = load_model(str(tmp_path), auto_class=CLASSIFIER, label_names=["0", "1", "2"])
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert torch.equal(tiny.logits(model), tiny.logits(trained))
    for load in (load_model, load_skeleton):
        with pytest.raises(SlimLoadError, match=r"head for 3 classes \(x, y, z\), and the data has 2"):
            load(str(tmp_path), auto_class=CLASSIFIER, label_names=["0", "1"])


def test_only_the_head_may_be_fresh(encoder):
    file = Path(encoder) / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SlimLoadError, match=r"lacks 1 weights.*layer\.1\.output\.dense\.weight"):
        load_model(encoder, auto_class=CLASSIFIER, label_names=["0", "1"])


def test_a_checkpoint_loads_as_the_class_that_it_was_saved_as(encoder, tmp_path):
    assert class_of(encoder) is BertModel
    assert class_of(str(tiny.save_base(tmp_path / "llama"))) is LlamaForCausalLM


@pytest.fixture
def packed(tmp_path):
    convert(prepare(tiny.llama(), QuantizationConfig("w8a8"))).save_pretrained(tmp_path / "packed")
    return str(tmp_path / "packed")


@pytest.mark.parametrize("mistake", [TypeError, AttributeError, NameError, AssertionError])
def test_a_mistake_of_ours_is_not_reported_as_a_damaged_checkpoint(packed, mistake, monkeypatch):
    def broken(*arguments):
        raise mistake("ours")

    monkeypatch.setattr(rebuild, "build_", as_ours(broken))
    with pytest.raises(mistake, match=r"^ours$"):
        load_model(packed)


def test_what_transformers_raises_about_a_checkpoint_is_an_error_of_loading(packed, tmp_path):
    config = Path(packed) / "config.json"
    whole = config.read_text()
    for damaged in (whole[:200], whole.replace('"num_hidden_layers": 3', '"num_hidden_layers": "many"'), "[]"):
        config.write_text(damaged)
        for load in (load_model, load_skeleton):
            with pytest.raises(SlimLoadError, match=r"packed.*([Ff]etch or (train them|make it) again)"):
                load(packed)
    (tmp_path / "packed" / "tokenizer.json").write_text('{"version": "1.0"')
    config.write_text(whole)
    with pytest.raises(SlimLoadError, match="could not be loaded by AutoTokenizer"):
        load_tokenizer(packed)


def test_a_checkpoint_of_a_newer_version_says_what_to_install(packed):
    config = Path(packed) / "config.json"
    config.write_text(config.read_text().replace('"mode": "packed"', '"mode": "woven"'))
    with pytest.raises(SlimLoadError, match=r"'woven'.*Install a newer hf_slim"):
        load_model(packed)
