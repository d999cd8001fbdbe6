"""However a batch is cut into micro-batches, the gradient of the optimizer step is the same."""

import gc

import peft
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from trl import SFTConfig, SFTTrainer

from hf_slim import QuantizationCallback
from hf_slim.distillation.losses.divergences import DIVERGENCES
from tests import tiny
from tests.distillation.capture.test_output_layer import gemma2
from tests.distillation.gradients import LENGTH, ROWS, Run, accumulation_error, error, padded_examples, padded_text

WIDE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
REGRESSION = {"num_labels": 2, "problem_type": "regression"}
MULTI_LABEL = {"num_labels": 3, "problem_type": "multi_label_classification"}
TOKEN_WEIGHTS = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1)).tolist()
SMOOTHED = {"attach": True, "settings": {"label_smoothing_factor": 0.1}}
EVERYTHING = {"temperature": 2.0, "hidden": {}, "attention": {}}


@pytest.fixture(autouse=True)
def _short_collections():
    gc.freeze()  # the Trainer collects garbage, which takes seconds where all libraries are loaded
    yield
    gc.unfreeze()


def gpt2(seed=0):
    return tiny.gpt2(seed, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def lora(targets=("q_proj", "v_proj", "down_proj"), **changes):
    settings = peft.LoraConfig(target_modules=list(targets), r=4, lora_dropout=0.0, init_lora_weights=False)
    return peft.get_peft_model(tiny.llama(**changes), settings)


def lora_head():
    return lora(["q_proj", "lm_head"], tie_word_embeddings=False)


def narrow_weights(seed=0):
    return tiny.llama(seed).bfloat16()


def sft(**arguments):
    return SFTTrainer(processing_class=tiny.tokenizer(), **arguments)


def completions(data=None):
    """Texts as TRL takes them: whole rows, and what of them is the answer; it drops rows without one."""
    rows = []
    for row in data or padded_text():
        length = sum(row.get("attention_mask", [1] * LENGTH))
        answer = [int(label != -100) for label in row["labels"][:length]]
        rows.append({"input_ids": row["input_ids"][:length], "completion_mask": answer})
    return Dataset.from_list(rows)


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def with_own_loss(**arguments):
    return Trainer(compute_loss_func=summed_loss, **arguments)


def of(family, teacher=None, **attributes):
    """A run of one family, taught by a model of the same with other weights."""
    return Run(family, [teacher or (lambda: family(seed=7))], **attributes)


def bert(labels, **changes):
    return Run(lambda: tiny.bert(**changes), [lambda: tiny.bert(seed=7, **changes)], lambda: padded_examples(labels))


LLAMA = of(tiny.llama)
CLASSES = bert([row % 3 for row in range(ROWS)])
YES_AND_NO = [[float(row % 2), float(row // 3 % 2), float(row // 4 % 2)] for row in range(ROWS)]
SFT = LLAMA.but(
    build=sft, arguments=SFTConfig, data=completions, attach=True,
    settings={"bf16": False, "completion_only_loss": True},
)  # fmt: skip

LOSSES = {name: LLAMA.but(config={"losses": name, "temperature": 2.0, "alpha": 0.3}) for name in DIVERGENCES}
LOSSES |= {f"{name}, top 5": LLAMA.but(config={"losses": name, "top_k": 5}) for name in DIVERGENCES}
HIDDEN = {
    f"{loss}{', pooled' * pooled}{', projected' * (teacher is not None)}": of(
        tiny.llama, teacher, config={"hidden": {"loss": loss, "pooled": pooled}}
    )
    for loss in ("cosine", "mse")
    for pooled in (False, True)
    for teacher in (None, lambda: tiny.llama(seed=7, **WIDE))
}
ATTENTION = {
    f"{loss} of {family.__name__}": of(family, config={"hidden": {}, "attention": {"loss": loss}})
    for loss in ("relations", "maps")
    for family in (tiny.llama, gpt2, tiny.bert_mlm, tiny.t5)
}
FAMILIES = {
    family.__name__: of(family, config={"temperature": 2.0})
    for family in (tiny.llama, tiny.qwen3, gpt2, tiny.bert_mlm, tiny.t5, tiny.mixtral)
}
FAMILIES |= {"capped logits": of(lambda seed=0: gemma2(final_logit_softcapping=2.0), config=EVERYTHING)}
HEADS = {
    "classes": CLASSES,
    "classes, everything": CLASSES.but(config=EVERYTHING),
    "classes, no labels": CLASSES.but(config={"alpha": 1.0, "losses": {"reverse_kl": 1.0, "forward_kl": 0.5}}),
    "one number": bert([row / 3 for row in range(ROWS)], num_labels=1),
    "numbers": bert([[row / 3, row / 5] for row in range(ROWS)], **REGRESSION),
}
SETTINGS = {
    "several teachers": Run(
        tiny.llama, [lambda: tiny.llama(seed=7), lambda: tiny.llama(seed=8)],
        config=EVERYTHING | {"teacher": ["first", "second"], "teacher_weights": [1.0, 3.0]},
    ),
    "token weights": LLAMA.but(
        data=lambda: padded_text(token_weights=TOKEN_WEIGHTS), settings={"remove_unused_columns": False}
    ),
    "checkpointing": LLAMA.but(config=EVERYTHING, settings={"activation_checkpointing": True}),
    "checkpointing of LoRA": Run(lora, config=EVERYTHING, settings={"activation_checkpointing": True}),
    "LoRA": Run(lora, LLAMA.teachers),
    "LoRA, taught by itself": Run(lora, config=EVERYTHING),
    "LoRA on the output layer": Run(lora_head, config=EVERYTHING),
    "rounded, taught by itself": LLAMA.but(teachers=[], others=lambda: [QuantizationCallback(tiny.QUANTIZATION)]),
    "rounded": LLAMA.but(config=EVERYTHING, others=lambda: [QuantizationCallback(tiny.QUANTIZATION)]),
}  # fmt: skip
TRAINERS = {
    "label smoothing": LLAMA.but(config=EVERYTHING, **SMOOTHED),
    "label smoothing of T5": of(tiny.t5, **SMOOTHED),
    "label smoothing of classes": CLASSES.but(**SMOOTHED),
    "label smoothing of LoRA": Run(lora, config=EVERYTHING, **SMOOTHED),
    "own loss": LLAMA.but(config=EVERYTHING, attach=True, build=with_own_loss),
    "attached without need": CLASSES.but(attach=True),
    "Seq2SeqTrainer": of(tiny.t5, build=Seq2SeqTrainer, arguments=Seq2SeqTrainingArguments),
    "Seq2SeqTrainer, label smoothing": of(
        tiny.t5, build=Seq2SeqTrainer, arguments=Seq2SeqTrainingArguments, **SMOOTHED
    ),
    "SFTTrainer": SFT,
    "SFTTrainer, everything": SFT.but(config=EVERYTHING),
    "SFTTrainer, label smoothing": SFT.but(settings=SFT.settings | SMOOTHED["settings"]),
    "SFTTrainer, LoRA": SFT.but(student=lora),
    "SFTTrainer, taught by itself": SFT.but(teachers=[]),
}
EXACT = LOSSES | HIDDEN | ATTENTION | FAMILIES | HEADS | SETTINGS | TRAINERS


@pytest.mark.parametrize("run", EXACT.values(), ids=EXACT.keys())
def test_4_times_2_rows_teach_what_8_rows_teach(run, tmp_path):
    assert accumulation_error(run, tmp_path) < 1e-6


def test_4_times_2_rows_with_several_labels_teach_what_8_rows_teach(tmp_path):
    # yes and no of random labels cancel out in the biases: float32 leaves them less precise
    assert accumulation_error(bert(YES_AND_NO, **MULTI_LABEL), tmp_path) < 3e-6


@pytest.mark.parametrize(
    "run",
    [LLAMA.but(config=EVERYTHING, settings={"bf16": True}), of(narrow_weights, config=EVERYTHING)],
    ids=["autocast", "weights"],
)
def test_in_bfloat16_they_agree_to_its_rounding(run, tmp_path):
    assert accumulation_error(run, tmp_path) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_alpha_follows_its_schedule(schedule, tmp_path):
    config = {"alpha": 0.8, "alpha_end": 0.2, "alpha_schedule": schedule}
    run = LLAMA.but(config=config, step=2, settings={"max_steps": 4})
    found = run.gradient(tmp_path, 2, 4)
    halfway = {"linear": 0.5, "cubic": 0.2 + 0.6 * 0.5**3}[schedule]
    assert error(found, LLAMA.but(config={"alpha": halfway}).gradient(tmp_path, 8)) < 1e-6


def test_attached_or_not_the_tokens_have_their_weights(tmp_path):
    run = SETTINGS["token weights"]
    attached = run.but(build=with_own_loss, attach=True).gradient(tmp_path, 8)
    assert error(attached, run.gradient(tmp_path, 8)) < 1e-6
    assert error(attached, LLAMA.gradient(tmp_path, 8)) > 0.01


@pytest.mark.parametrize("run", [SFT, LLAMA.but(attach=True, build=with_own_loss)], ids=["SFTTrainer", "own loss"])
def test_an_attached_trainer_teaches_what_the_models_own_loss_teaches(run, tmp_path):
    run = run.but(config=EVERYTHING | {"alpha": 0.3})
    # TRL drops the two rows without labels, so that their hidden states and attention teach nothing: as they would
    assert error(run.gradient(tmp_path, 8), LLAMA.but(config=run.config).gradient(tmp_path, 8)) < 1e-6


def test_parts_of_a_text_that_are_not_predicted_do_not_count(tmp_path):
    """The measure of all these tests would notice a mean per micro-batch."""
    labels_count_alike = LLAMA.but(data=lambda: tiny.text_data(ROWS))
    assert error(LLAMA.gradient(tmp_path, 8), labels_count_alike.gradient(tmp_path, 8)) > 0.1
