import peft
import pytest
import torch

from hf_slim import SlimError
from hf_slim.distillation.on_policy import OnPolicyConfig, generated_completions, generation_seed, is_on_policy
from tests import tiny

SAMPLED = OnPolicyConfig(max_new_tokens=6, temperature=1.0)
GREEDY = OnPolicyConfig(max_new_tokens=6, temperature=0)
FAMILIES = {"llama": tiny.llama, "gpt2": tiny.gpt2}


def batch(side="right"):
    """Prompts of 3, 5 and 2 tokens with completions of 4, 3 and 1, padded."""
    rows = []
    for row, (prompt, completion) in enumerate([(3, 4), (5, 3), (2, 1)]):
        ids = tiny.tokens(1, prompt + completion, seed=row + 1)[0] % 90 + 3  # no special tokens
        labels = torch.cat([torch.full((prompt,), -100), ids[prompt:]])
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})

    def padded(name, value):
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value, padding_side=side)

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100),
            "attention_mask": padded("attention_mask", 0)}  # fmt: skip


PROMPTS = [batch()["input_ids"][row, :length] for row, length in enumerate([3, 5, 2])]


def completions(found):
    """Prompt and completion of each row, after a check that labels and mask fit them."""
    pairs = []
    for ids, labels, mask in zip(found["input_ids"], found["labels"], found["attention_mask"], strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        start = int((labels != -100).nonzero()[0])
        assert torch.equal(labels[start:length], ids[start:length])
        assert (labels[:start] == -100).all()
        assert (labels[length:] == -100).all()
        pairs.append((ids[:start], ids[start:length]))
    return pairs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_kept_and_greedy_completions_are_those_without_padding(family, side):
    model = FAMILIES[family]().train()
    found = completions(generated_completions(model, batch(side), GREEDY, seed=0))
    model.eval()
    for (prompt, completion), given in zip(found, PROMPTS, strict=True):
        assert torch.equal(prompt, given)
        alone = model.generate(given[None], max_new_tokens=6, do_sample=False)[0, len(given) :]
        assert torch.equal(completion, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_completions_and_the_global_state_is_unchanged(family):
    model = FAMILIES[family]()
    first = generated_completions(model, batch(), SAMPLED, seed=3)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again, other = (
        generated_completions(model, batch(), SAMPLED, seed=3),
        generated_completions(model, batch(), SAMPLED, seed=4),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_ids"], other["input_ids"])


def test_a_completion_ends_with_the_end_of_text_which_has_a_label():
    model = tiny.llama()
    (_, completion), *_ = completions(generated_completions(model, batch(), GREEDY, seed=0))
    model.generation_config.eos_token_id = [95, int(completion[2])]
    found = completions(generated_completions(model, batch(), GREEDY, seed=0))
    end = (completion == completion[2]).nonzero()[0] + 1
    assert torch.equal(found[0][1], completion[:end])
    assert len(found[1][1]) <= 6


def test_an_empty_completion_still_has_the_end_of_text():
    model = tiny.llama()
    (_, completion), *_ = completions(generated_completions(model, batch(), GREEDY, seed=0))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = int(completion[0])
    assert completions(generated_completions(model, batch(), GREEDY, seed=0))[0][1].tolist() == [int(completion[0])]


def test_a_text_without_a_prompt_is_cut_and_one_without_labels_is_a_prompt():
    inputs = {"input_ids": tiny.tokens(2, 10) % 90 + 3}
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][0, 8:] = -100  # padding of a batch without a mask
    inputs["labels"][1] = -100
    found = completions(
        generated_completions(tiny.llama(), inputs, OnPolicyConfig(max_new_tokens=2, prompt_share=0.5), seed=0)
    )
    assert torch.equal(found[0][0], inputs["input_ids"][0, :4])
    assert torch.equal(found[1][0], inputs["input_ids"][1])


def test_the_model_is_as_before_also_after_an_exception(monkeypatch):
    model = tiny.llama().train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.generation_config.top_p = 0.3
    modes = {name: module.training for name, module in model.named_modules()}
    config, lengths = model.generation_config, []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    def check():
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert model.generation_config is config
        assert config.top_p == 0.3
        assert model.config.use_cache is False
        assert model.is_gradient_checkpointing

    generated_completions(model, batch(), GREEDY, seed=0)
    assert lengths == [5, 1, 1, 1, 1, 1]  # a cache was used
    check()
    monkeypatch.setattr(model, "generate", lambda **kwargs: 1 / 0)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        generated_completions(model, batch(), SAMPLED, seed=0)
    check()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_models_generation_config_is_not_used():
    model = tiny.llama()
    plain = generated_completions(model, batch(), SAMPLED, seed=0)
    vars(model.generation_config).update(top_p=0.01, top_k=1, repetition_penalty=50.0, max_length=3)
    assert torch.equal(generated_completions(model, batch(), SAMPLED, seed=0)["input_ids"], plain["input_ids"])


def test_samples_follow_the_models_own_distribution():
    model = tiny.llama(max_position_embeddings=8)
    model.lm_head.weight.data.mul_(20)
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.full((1, 3), -100)}
    many = {name: value.repeat(5000, 1) for name, value in prompt.items()}
    found = generated_completions(model, many, OnPolicyConfig(max_new_tokens=1, temperature=2.0), seed=0)["input_ids"][
        :, 3
    ]
    with torch.no_grad():
        wanted = (model.eval()(input_ids=prompt["input_ids"]).logits[0, -1] / 2).softmax(-1)
    share = torch.bincount(found, minlength=tiny.VOCAB_SIZE) / len(found)
    assert (share - wanted).abs().max() < 0.03
    assert wanted.max() > 0.06  # far from uniform


def test_completions_end_at_the_last_position_and_a_prompt_that_fills_all_is_dropped():
    model = tiny.gpt2(n_positions=7)
    inputs = {"input_ids": tiny.tokens(2, 7), "labels": tiny.tokens(2, 7)}
    inputs["labels"][0] = -100  # fills all positions
    inputs["labels"][1, :4] = -100
    found = generated_completions(model, inputs, GREEDY, seed=0)
    assert found["input_ids"].shape == (1, 7)
    with pytest.raises(SlimError, match=r"leaves a position.*\[7\].*7 positions"):
        generated_completions(model, {name: value[:1] for name, value in inputs.items()}, GREEDY, seed=0)


def test_a_model_with_adapters_generates_with_them():
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )  # fmt: skip
    model = peft.get_peft_model(tiny.llama(), lora)
    model.train()
    owners = (model, model.get_base_model())
    configs = [vars(owner).get("generation_config") for owner in owners]
    found = generated_completions(model, batch(), GREEDY, seed=0)
    assert [vars(owner).get("generation_config") for owner in owners] == configs
    assert model.training
    merged = model.merge_and_unload()
    assert torch.equal(generated_completions(merged, batch(), GREEDY, seed=0)["input_ids"], found["input_ids"])
    assert not torch.equal(
        generated_completions(tiny.llama(), batch(), GREEDY, seed=0)["input_ids"], found["input_ids"]
    )


def test_inputs_of_the_original_text_only_are_refused():
    model = tiny.llama()
    with pytest.raises(SlimError, match="cannot use position_ids"):
        generated_completions(model, batch() | {"position_ids": torch.arange(8)[None]}, GREEDY, seed=0)
    with pytest.raises(SlimError, match="labels is missing"):
        generated_completions(model, {"input_ids": tiny.tokens()}, GREEDY, seed=0)
    with pytest.raises(SlimError, match="Sequential cannot generate text"):
        generated_completions(tiny.cnn(), batch(), GREEDY, seed=0)
    generated_completions(model, batch() | {"num_items_in_batch": 8}, GREEDY, seed=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"share": 50}, "For 50% write 0.5"),
        ({"prompt_share": 0}, "no prompt to continue"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be a whole number of at least 1"),
        ({"temperature": -1}, "number of at least 0"),
        ({"temperature": float("nan")}, "number of at least 0"),
    ],
)
def test_settings_check_their_ranges(settings, says):
    with pytest.raises(SlimError, match=says):
        OnPolicyConfig(**settings)


def test_the_choice_of_micro_batches_is_reproducible_and_has_the_requested_share():
    chosen = [is_on_policy(0.3, 1, step, micro) for step in range(2000) for micro in range(2)]
    assert chosen == [is_on_policy(0.3, 1, step, micro) for step in range(2000) for micro in range(2)]
    assert abs(sum(chosen) / len(chosen) - 0.3) < 0.03
    assert not any(is_on_policy(0, 1, step, 0) for step in range(100))
    assert all(is_on_policy(1, 1, step, 0) for step in range(100))
    assert chosen[:100] != [is_on_policy(0.3, 2, step, micro) for step in range(50) for micro in range(2)]
    assert (
        len({generation_seed(0, step, micro, rank) for step in range(5) for micro in range(5) for rank in range(5)})
        == 125
    )
