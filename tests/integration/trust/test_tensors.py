"""Missing and wrong tensors of a compressed checkpoint are refused before memory is given to them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertForMaskedLM

from hf_slim import PruningConfig, QuantizationConfig, SlimLoadError, convert, prepare
from hf_slim.integration.loading import load_model
from tests import tiny

KINDS = {
    "channel": QuantizationConfig("w8a8-static", embeddings="w8a16"),
    "groups": QuantizationConfig("w4a16-g16-asym", embeddings="w8a16"),
    "codebook": QuantizationConfig("codebook3"),
}


def saved(folder, *configs, family=tiny.llama):
    model = prepare(family(), *configs)
    model.train()(input_ids=tiny.tokens())  # static scales of activations need data
    convert(model.eval()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def packed(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("packed"), KINDS[request.param])


def changed(folder, target, change):
    """A copy of a folder with other tensors."""
    target.mkdir(exist_ok=True)
    for path in folder.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_model])
def test_no_tensor_of_a_packed_layer_may_be_missing(packed, tmp_path, load):
    names = [name for name in load_file(packed / "model.safetensors") if "layers.0." in name or "embed" in name]
    assert any(name.endswith("_scale") for name in names)
    for name in names:
        folder = changed(packed, tmp_path / "changed", lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(SlimLoadError, match=f"lack 1 tensors: {name}"):
            load(str(folder))


def test_another_shape_or_dtype_is_refused(packed, tmp_path):
    state = load_file(packed / "model.safetensors")
    quantized = [name for name in state if state[name].dtype == torch.int8 or "_proj.weight_" in name]
    for name in quantized[:8]:
        for change, says in (
            (lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}), "has shape"),
            (lambda tensors, name: tensors.update({name: tensors[name].double()}), "its scheme needs"),
        ):
            folder = changed(packed, tmp_path / "changed", lambda tensors, n=name, c=change: c(tensors, n))
            with pytest.raises(SlimLoadError, match=rf"'{name}' (is|has) .*{says.removeprefix('has ')}"):
                AutoModelForCausalLM.from_pretrained(folder)


def test_scales_that_were_narrowed_with_the_model_still_load(tmp_path):
    model = convert(prepare(tiny.llama(), QuantizationConfig("w8a16")))
    torch.nn.Module.to(model, torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    assert torch.equal(
        loaded.model.layers[0].mlp.up_proj.weight_scale, model.model.layers[0].mlp.up_proj.weight_scale.float()
    )


def test_float_weights_of_the_base_model_may_not_be_missing(packed, tmp_path):
    folder = changed(packed, tmp_path / "changed", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(SlimLoadError, match=r"lack 1 tensors: model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_head_may_be_fresh_or_of_another_size(tmp_path):
    saved(tmp_path / "mlm", QuantizationConfig("w8a16"), family=tiny.bert_mlm)
    assert AutoModel.from_pretrained(tmp_path / "mlm").pooler is not None
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mlm", num_labels=5)
    assert classifier.classifier.out_features == 5
    classifier.save_pretrained(tmp_path / "five")
    other = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "five", num_labels=3, ignore_mismatched_sizes=True
    )
    assert other.classifier.out_features == 3
    assert torch.equal(
        BertForMaskedLM.from_pretrained(tmp_path / "mlm").bert.encoder.layer[0].output.dense.weight,
        other.bert.encoder.layer[0].output.dense.weight,
    )


@pytest.mark.parametrize("config", [{"learn": "lsq"}, {"observer": "mse"}, {"freeze": 0.5}, {"initialize": "gptq"}])
def test_a_training_checkpoint_of_a_tied_model_loads_whole(config, tmp_path):
    configs = QuantizationConfig("w4a16", group_size=16, embeddings="w8a16", **config)
    model = prepare(tiny.llama(), configs)
    model.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("hf_slim_checksums", None)
    change(config, config["quantization_config"])
    path.write_text(json.dumps(config))


UP = "model.layers.0.mlp.up_proj"
DAMAGE = {
    "shape": (lambda c, q: q["shapes"].update({f"{UP}.weight": [10**6, 10**6]}), "which is what the files hold"),
    "dimensions": (lambda c, q: q["shapes"].update({f"{UP}.weight": [3]}), "gives .* the shape"),
    "no tensor": (lambda c, q: q["shapes"].update({f"{UP}.forward": [3]}), "has no such tensor"),
    "types": (lambda c, q: q["shapes"].update({f"{UP}.weight": ["3", 4]}), "must be a list of sizes"),
    "negative": (lambda c, q: q["shapes"].update({f"{UP}.weight": [-3, 4]}), "must be a list of sizes"),
    "attributes": (lambda c, q: q["attributes"].update({"model": {"forward": 3}}), "is no number of that module"),
    "private": (lambda c, q: q["attributes"].update({"model": {"__class__": 3}}), "is no number of that module"),
    "large": (lambda c, q: q["attributes"].update({"model": {"vocab_size": 10**12}}), "must be a number up to"),
    "text": (lambda c, q: q["attributes"].update({"model": {"vocab_size": "3"}}), "a mapping from attributes to"),
    "scheme": (lambda c, q: q["layers"].update({UP: "w9a16"}), "Unknown quantization scheme"),
    "group": (lambda c, q: q["layers"].update({UP: f"w4a16-g{10**12}"}), "groups larger than"),
    "digits": (lambda c, q: q["layers"].update({UP: "w4a16-g" + "1" * 150}), "groups larger than"),
    "grid": (lambda c, q: q["layers"].update({UP: {"weights": {"bits": "4"}}}), r"weights\.bits.*the wrong type"),
    "no grid": (lambda c, q: q["layers"].update({UP: {}}), "no `weights`"),
    "no layer": (lambda c, q: q["layers"].update({"model.norm": "w8a16"}), "no weight that can be quantized"),
    "list": (lambda c, q: q.update(layers=[UP]), "`quantization_config.layers` .* must be a mapping"),
    "mode": (lambda c, q: q.update(mode=["packed"]), "must be a text"),
    "training": (lambda c, q: q.update(mode="qat", techniques={}), "which a training checkpoint needs"),
    "training scheme": (
        lambda c, q: (q.update(mode="qat"), q["techniques"]["quantization"].update(scheme={})),
        "no `weights`",
    ),
    "training grid": (
        lambda c, q: (
            q.update(mode="qat"),
            q["techniques"]["quantization"].update(overrides={"a": {"weights": {"kind": []}}}),
        ),
        "the wrong type",
    ),
    "cache": (lambda c, q: q["techniques"]["quantization"].update(kv_cache="int3"), "another `kv_cache`"),
    "vocabulary": (lambda c, q: c.update(vocab_size=10**9), "has shape"),
    "layers": (lambda c, q: c.update(num_hidden_layers=10**8), "its weights allow at most"),
    "fewer layers": (lambda c, q: c.update(num_hidden_layers=5), "lack"),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_model])
def test_settings_that_fit_no_model_are_refused(what, load, tmp_path):
    change, says = DAMAGE[what]
    pruning = PruningConfig(sparsity={"ffn": 0.4}, uniform=False, criterion="l2")
    # with sizes of every layer in config.json the host itself goes through all layers that the file claims
    configs = (
        [QuantizationConfig("w4a16", group_size=16)]
        if what == "layers"
        else [pruning, QuantizationConfig("w4a16", group_size=16)]
    )
    folder = saved(tmp_path / "packed", *configs)
    edit(folder, change)
    with pytest.raises(SlimLoadError, match=says):
        load(str(folder))


def test_an_ordinary_model_that_asks_for_far_more_than_its_files_is_refused(tmp_path):
    tiny.save_base(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10**7}))
    with pytest.raises(SlimLoadError, match=r"config\.json describes a model of 48\d,\d{3},\d{3}"):
        load_model(str(tmp_path))


def test_pickles_are_refused(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SlimLoadError, match="can run code while they are read"):
        load_model(str(tmp_path))


def test_a_folder_with_code_of_its_own_does_not_wait_for_an_answer(tmp_path):
    tiny.save_base(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(SlimLoadError, match="could not be loaded"):
        load_model(str(tmp_path))
