"""Every family: its structure is found without a table of names, and what is masked is what is removed."""

import pytest
import torch
import transformers

from hf_slim import PruningConfig, QuantizationConfig, convert, prepare
from hf_slim.pruning.config import KINDS
from hf_slim.pruning.removal.cut import remove_groups_
from hf_slim.pruning.removal.masked_norms import mask_norms_
from hf_slim.pruning.structure.find import find_group_sets, understand
from hf_slim.pruning.transform import mask_groups_
from tests.families import EAGER_ONLY, FAMILIES, UNSUPPORTED, output, random_groups, random_sizes, supported

ALONE = [(name, (kind,)) for name in FAMILIES for kind in supported(name)]
TOGETHER = [(name, supported(name)) for name in FAMILIES if len(supported(name)) > 1]
REMOVALS = [
    pytest.param(name, kinds, attention, id=f"{name}-{kinds[0] if len(kinds) == 1 else 'all'}-{attention}")
    for name, kinds in ALONE + TOGETHER
    for attention in ("eager", "sdpa")
    if attention == "eager" or name not in EAGER_ONLY
]
DEPTH_AND_WIDTH = ("attention_blocks", "ffn_blocks", "experts", "hidden")  # each alone gives a slim folder


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_matrix_is_as_large_as_it_was():
    assert len(FAMILIES) == 31
    assert (len(ALONE), len(TOGETHER), len(REMOVALS)) == (183, 30, 404)
    assert UNSUPPORTED.keys() == {*KINDS}
    for name, family in FAMILIES.items():
        assert {kind for kind in KINDS if getattr(family, kind)} == {*supported(name)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_structure_is_found(name):
    family = FAMILIES[name]
    model = family.build()
    assert name in EAGER_ONLY or model.config._attn_implementation == "sdpa"  # GPT-J has it since 5.24
    found, refusals = understand(model)
    assert {group_set.kind for group_set in found} == {*supported(name)}
    present = {kind for kind in KINDS if getattr(family, kind)}
    assert {refusal.kind for refusal in refusals} & present <= {family.partly}
    assert {kind: sum(g.kind == kind for g in found) for kind in KINDS} == {
        kind: getattr(family, kind) for kind in KINDS
    }


@pytest.mark.parametrize(("name", "kinds", "attention"), REMOVALS)
def test_removing_masked_groups_leaves_the_output(name, kinds, attention):
    seed = sum(map(ord, name + "".join(kinds)))
    model = FAMILIES[name].build(seed, **random_sizes(FAMILIES[name].config, seed, kinds))
    model.set_attn_implementation(attention)
    group_sets = [group_set for group_set in find_group_sets(model) if group_set.kind in kinds]
    removed = random_groups(group_sets, seed)
    assert {group_set.kind for group_set in group_sets if removed.get(group_set.name)} == {*kinds}
    before, whole = size_of(model), output(model)
    mask_groups_(model, group_sets, removed)
    masked = output(model)
    assert not torch.allclose(masked, whole, rtol=1e-4, atol=2e-5)  # what goes had something to say
    mask_norms_(model, group_sets, {})
    remove_groups_(model, group_sets, removed)
    torch.testing.assert_close(output(model), masked, rtol=1e-4, atol=2e-5)
    assert size_of(model) < before


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_pruned_is_saved_and_loads_back(name, uniform, tmp_path):
    family = FAMILIES[name]
    model = family.build()
    before = size_of(model)
    kinds = [kind for kind in supported(name) if kind not in ("heads", "attention_blocks", "ffn_blocks")]
    model = convert(prepare(model, PruningConfig(dict.fromkeys(kinds, 0.5), uniform=uniform, criterion="l1")))
    assert size_of(model) < before
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, family.model).from_pretrained(tmp_path)
    weights, expected = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)  # alignment of memory shows


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3", "t5"])
def test_uniform_heads_and_neurons_give_an_ordinary_checkpoint(name):
    config = PruningConfig({"ffn": 0.5, "kv_heads": 0.34}, criterion="l1")
    model = convert(prepare(FAMILIES[name].build(), config))
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "opt", "falcon", "bert", "roberta", "distilbert", "vit", "mixtral"]
)
def test_uniform_neurons_give_an_ordinary_checkpoint(name):
    model = convert(prepare(FAMILIES[name].build(), PruningConfig({"ffn": 0.5}, criterion="l1")))
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "phi3"])
def test_what_was_pruned_and_packed_loads_back(name, uniform, tmp_path):
    family = FAMILIES[name]
    quantization = QuantizationConfig("w8a16", embeddings="w8a16")
    model = prepare(family.build(), PruningConfig({"ffn": 0.5}, uniform=uniform, criterion="l1"), quantization)
    convert(model).save_pretrained(tmp_path)
    loaded = getattr(transformers, family.model).from_pretrained(tmp_path)
    weights, expected = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "layers" in supported(name)])
def test_fewer_layers_give_an_ordinary_checkpoint(name):
    model = convert(prepare(FAMILIES[name].build(), PruningConfig({"layers": 0.5}, criterion="l1")))
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (kind,) in ALONE if kind in DEPTH_AND_WIDTH])
def test_each_kind_alone_loads_back(name, kind, tmp_path):
    family = FAMILIES[name]
    model = family.build()
    before = size_of(model)
    model = convert(prepare(model, PruningConfig({kind: 0.5}, criterion="l1")))
    assert size_of(model) < before
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, family.model).from_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "mixtral", "qwen3_moe"])
def test_a_smaller_hidden_width_gives_an_ordinary_checkpoint(name):
    model = convert(prepare(FAMILIES[name].build(), PruningConfig({"hidden": 0.5}, criterion="l1")))
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.hidden_size == 24


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_embeddings_scaled_by_their_width_keep_their_scale(name, tmp_path):
    model = convert(prepare(FAMILIES[name].build(), PruningConfig({"hidden": 0.5}, criterion="l1")))
    assert model.config.quantization_config.mode == "pruned"


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fewer_experts_give_an_ordinary_checkpoint(name):
    model = convert(prepare(FAMILIES[name].build(), PruningConfig({"experts": 0.5}, criterion="l1")))
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_finding_the_structure_leaves_the_model_alone(name):
    model = FAMILIES[name].build()
    before, attributes = output(model), {path: set(vars(module)) for path, module in model.named_modules()}
    understand(model)
    assert torch.equal(output(model), before)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
