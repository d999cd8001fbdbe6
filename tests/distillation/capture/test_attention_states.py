import threading

import peft
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_slim import SlimError
from hf_slim.distillation.capture.attention_states import attention_states
from hf_slim.distillation.losses.attention import relation_loss, states_map_loss
from hf_slim.integration.kv_cache import cache_argument, cache_of
from tests import families, tiny

MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [0] * 4 + [1] * 8, [1] + [0] * 11])  # whole, right, left, one token


def recorded(model, layers, mask=MASK, **inputs):
    with attention_states(model, layers) as found:
        model(input_ids=tiny.tokens(), attention_mask=mask, **inputs)
    return found


def linear_outputs(model, names, head_dim):
    outputs = {}
    for name in names:

        def keep(module, args, output, name=name):
            outputs[name] = output.unflatten(-1, (-1, head_dim)).transpose(1, 2)

        model.get_submodule(name).register_forward_hook(keep)
    return outputs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_states_of_bert_are_what_its_linear_layers_give(implementation):
    model = tiny.bert(attn_implementation=implementation).eval()
    names = [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key", "value")]
    wanted = linear_outputs(model, names, head_dim=8)
    (state,) = recorded(model, [-1])
    for found, name in zip((state.query, state.key, state.value), names, strict=True):
        assert torch.equal(found, wanted[name])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_states_of_llama_are_rotated_and_not_repeated(implementation):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny.llama(attn_implementation=implementation).eval()
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    wanted = linear_outputs(model, names, head_dim=8)
    last, first = recorded(model, [2, 0])
    cos, sin = model.model.rotary_emb(first.query, torch.arange(12)[None])
    query, key = apply_rotary_pos_emb(wanted[names[0]], wanted[names[1]], cos, sin)
    assert torch.equal(first.query, query)
    assert torch.equal(first.key, key)
    assert torch.equal(first.value, wanted[names[2]])
    assert first.key.shape[1] == 3
    assert not torch.equal(last.query, first.query)


RECORDABLE = [
    "llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "bert", "roberta", "distilbert", "albert",
    "mixtral", "modernbert", "smollm3", "t5", "bart",
]  # fmt: skip


def family_inputs(model):
    more = {"decoder_input_ids": tiny.tokens(length=5, seed=1)} if model.config.is_encoder_decoder else {}
    return {"input_ids": tiny.tokens(), "attention_mask": MASK[[0, 1, 1, 0]]} | more


@pytest.mark.parametrize("family", RECORDABLE)
def test_maps_are_those_that_eager_returns(family):
    maps, outputs = [], []
    for implementation in ("eager", "sdpa"):
        if family == "gemma2" and implementation == "sdpa":
            continue  # its soft cap is not in sdpa
        model = families.FAMILIES[family].build()
        model.set_attn_implementation(implementation)
        wanted = {"output_attentions": True} if implementation == "eager" else {}
        with torch.no_grad(), attention_states(model, [0, 1]) as found:
            outputs.append(model(**family_inputs(model), **wanted))
        maps.append([state.attention_map() for state in found])
    given = outputs[0].encoder_attentions if model.config.is_encoder_decoder else outputs[0].attentions
    valid = MASK[[0, 1, 1, 0]].bool()[:, None, :]
    for tried in maps:
        for ours, theirs in zip(tried, given, strict=False):
            counted = valid.expand(ours.shape[:3])
            torch.testing.assert_close(ours[counted], theirs[counted], rtol=1e-4, atol=1e-6)


def test_maps_are_without_dropout_and_refuse_other_implementations():
    model = tiny.llama(attn_implementation="eager", attention_dropout=0.5)
    train, evaluated = recorded(model.train(), [0]), recorded(model.eval(), [0])
    torch.testing.assert_close(train[0].attention_map(), evaluated[0].attention_map())
    AttentionInterface.register("watched", ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model.config._attn_implementation = "watched"
        (state,) = recorded(model, [0], mask=None)
        assert state.query.shape == (4, 6, 12, 8)  # relations go with anything
        with pytest.raises(SlimError, match=r"'watched'.*eager"):
            state.attention_map()
    finally:
        del AttentionInterface._global_mapping["watched"]


def test_recording_changes_nothing_and_leaves_nothing_behind():
    model = tiny.llama().eval()
    before = tiny.logits(model)
    with torch.no_grad(), attention_states(model, [0]):
        assert torch.equal(model(input_ids=tiny.tokens()).logits, before)
        assert "get_interface" in vars(ALL_ATTENTION_FUNCTIONS)
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(ZeroDivisionError), attention_states(model, [0]):
        1 / 0  # noqa: B018
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    mine = ALL_ATTENTION_FUNCTIONS.get_interface
    ALL_ATTENTION_FUNCTIONS.get_interface = mine
    try:
        recorded(model, [0])
        assert vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] is mine  # a replacement by other code is restored
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


def test_two_models_are_recorded_at_once_each_for_itself():
    student, teacher = tiny.llama(), tiny.llama(seed=1, num_attention_heads=3, num_hidden_layers=2)
    with attention_states(student, [0]) as ours, attention_states(teacher, [1]) as theirs:
        student(input_ids=tiny.tokens())
        teacher(input_ids=tiny.tokens())
    assert (ours[0].query.shape[1], theirs[0].query.shape[1]) == (6, 3)
    assert ours[0].call.module is student.model.layers[0].self_attn
    assert theirs[0].call.module is teacher.model.layers[1].self_attn


def test_a_model_with_adapters_is_recorded_with_them():
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    plain, adapted = tiny.llama(), peft.get_peft_model(tiny.llama(), lora)
    (before,), (after,) = recorded(plain, [0]), recorded(adapted, [0])
    assert torch.equal(before.key, after.key)
    assert not torch.equal(before.query, after.query)


def test_a_student_learns_to_relate_as_its_teacher():
    teacher, student = tiny.bert(seed=1), tiny.bert(num_hidden_layers=1, num_attention_heads=2, hidden_size=16)
    with torch.no_grad():
        (wanted,) = recorded(teacher, [-1])
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=1e-2), []
    for _ in range(30):
        (found,) = recorded(student, [-1])
        losses.append(relation_loss(found, wanted, MASK, relation_heads=4) / MASK.sum())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


def test_another_thread_is_not_recorded():
    model = tiny.llama().eval()

    def run_elsewhere():
        with attention_states(model, [0]):
            thread = threading.Thread(target=tiny.logits, args=(model,))
            thread.start()
            thread.join()

    with pytest.raises(SlimError, match="cannot be recorded"):  # nothing was called here
        run_elsewhere()


def test_what_cannot_be_recorded_is_named():
    with pytest.raises(SlimError, match=r"DebertaV2ForSequenceClassification.*hidden states"):
        recorded(families.FAMILIES["deberta"].build(), [0])
    with pytest.raises(SlimError, match=r"FalconForCausalLM.*hidden states"):
        recorded(families.FAMILIES["falcon"].build(), [0])
    with pytest.raises(SlimError, match=r"layer 3, .*called 3 .*-3 to 2"):
        recorded(tiny.llama(), [0, 3])
    model = tiny.llama()
    cache = cache_of(model(input_ids=tiny.tokens()))
    with pytest.raises(SlimError, match=r"12 positions to 24.*use_cache=False"):
        recorded(model, [0], mask=None, **{cache_argument(model): cache})


def student_gradients(checkpointing, loss, implementation="sdpa"):
    student = tiny.llama(num_hidden_layers=2, attn_implementation=implementation)
    teacher = tiny.llama(seed=1, num_attention_heads=3, num_key_value_heads=3, head_dim=16).eval()
    if checkpointing is not None:
        student.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        student.enable_input_require_grads()
    student.train()
    with torch.no_grad():
        wanted = recorded(teacher, [0, 2])
    found = recorded(student, [0, 1], use_cache=False)
    sum(loss(ours, theirs, MASK) for ours, theirs in zip(found, wanted, strict=True)).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def causal_relations(ours, theirs, valid):
    return relation_loss(ours, theirs, valid, 4, causal=True)


@pytest.mark.parametrize("loss", [causal_relations, states_map_loss])
def test_gradients_are_right_under_checkpointing(loss):
    plain, checkpointed = (student_gradients(mode, loss) for mode in (None, "recomputed"))
    assert "model.layers.1.self_attn.q_proj.weight" in plain
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_eager_and_sdpa_give_the_same_gradients():
    eager, sdpa = (student_gradients(None, states_map_loss, how) for how in ("eager", "sdpa"))
    for name, gradient in eager.items():
        torch.testing.assert_close(sdpa[name], gradient, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(SlimError, match="use_reentrant"):
        student_gradients("reentrant", causal_relations)
