"""Training from stored answers."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from hf_slim import DistillationCallback, SlimError
from hf_slim.distillation.store.format import StoreInfo, tokenizer_hash
from hf_slim.distillation.store.writer import StoredTeacherWriter, finish_store
from hf_slim.distillation.teachers.live import freeze_
from tests import tiny


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.first = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def store(folder, teacher, data, k=8, **changes):
    ids = torch.tensor(data["input_ids"])
    with torch.no_grad():
        logits = teacher(input_ids=ids).logits
    settings = {
        "k": k, "n_classes": logits.shape[-1], "per": "token" if logits.dim() == 3 else "example", "temperature": 2.0,
        "dtype": "float32", "tokenizer_hash": "", "teacher_hash": "",
    } | changes  # fmt: skip
    with StoredTeacherWriter(folder, info := StoreInfo(**settings)) as writer:
        writer.add({"input_ids": ids}, logits)
    finish_store(folder, info)
    return str(folder)


def gradients(folder, model, data, callback):
    watch = Gradients()
    tiny.trainer(model, folder, [callback, watch], data, max_steps=1, max_grad_norm=0.0).train()
    return watch.first


@pytest.mark.parametrize(("family", "k"), [("llama", 8), ("llama", tiny.VOCAB_SIZE), ("bert", 3)])
def test_stored_answers_teach_what_the_live_teacher_does(family, k, tmp_path):
    make, data = tiny.FAMILIES[family], tiny.class_data() if family == "bert" else tiny.text_data(ragged=True)
    teacher, config = freeze_(make(seed=7)), {"temperature": 2.0, "losses": {"forward_kl": 1.0, "reverse_kl": 0.3}}
    live = gradients(tmp_path, make(), data, DistillationCallback(config | {"top_k": k}, teacher=teacher))
    folder = store(tmp_path / "store", teacher, data, k)
    stored = gradients(tmp_path, make(), data, DistillationCallback(config | {"teacher": folder}))
    for name, gradient in live.items():
        assert (stored[name] - gradient).norm() <= 2e-3 * gradient.norm() + 1e-7, name  # stored in half precision


def test_padding_and_batch_order_do_not_matter(tmp_path):
    rows = [row[: 4 + number % 5] for number, row in enumerate(tiny.tokens(16).tolist())]
    teacher, folder = freeze_(tiny.bert(seed=7)), tmp_path / "store"
    info = StoreInfo(3, 3, "example", 1.0, "float32", "", "")
    with StoredTeacherWriter(folder, info) as writer, torch.no_grad():
        for row in rows:
            writer.add({"input_ids": torch.tensor([row])}, teacher(input_ids=torch.tensor([row])).logits)
    finish_store(folder, info)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    data = Dataset.from_dict({"input_ids": rows, "labels": [len(row) % 3 for row in rows]})
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    found = []
    for callback in (
        DistillationCallback({"teacher": str(folder), "alpha": 1.0}),
        DistillationCallback({"alpha": 1.0}, teacher=teacher),
    ):
        args, watch = TrainingArguments(str(tmp_path), **settings), Gradients()
        collator = DataCollatorWithPadding(tokenizer)  # rows of several lengths, in the order of the sampler
        trainer = Trainer(tiny.bert(), args, train_dataset=data, callbacks=[callback, watch], data_collator=collator)
        trainer.train()
        found.append(watch.first)
    stored, live = found
    assert sum(gradient.norm() for gradient in live.values()) > 0
    for name, gradient in live.items():
        assert (stored[name] - gradient).norm() <= 2e-3 * gradient.norm() + 1e-6, name  # stored in half precision


@pytest.mark.parametrize(
    ("changes", "config", "says"),
    [
        ({}, {"hidden": {}}, "Remove `hidden`"),
        ({}, {"on_policy": {}}, "`on_policy`"),
        ({}, {"temperature": 1.0}, "temperature"),
        ({"n_classes": 95}, {}, "95"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_before_training(changes, config, says, tmp_path):
    data = tiny.text_data()
    teacher = freeze_(tiny.llama(seed=7, vocab_size=changes.get("n_classes", tiny.VOCAB_SIZE)))
    ids = [[min(i, 94) for i in row] for row in data["input_ids"]]
    folder = store(tmp_path / "store", teacher, {"input_ids": ids}, **changes)
    with pytest.raises(SlimError, match=says):
        tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback({"temperature": 2.0, "teacher": folder} | config)])


def test_another_tokenizer_is_refused(tmp_path):
    teacher, data = freeze_(tiny.llama(seed=7)), tiny.text_data()
    folder = store(tmp_path / "store", teacher, data, tokenizer_hash=tokenizer_hash(tiny.tokenizer()))
    other = tiny.tokenizer()
    other.add_tokens(["more"])
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True)
    callback = DistillationCallback({"teacher": folder, "temperature": 2.0})
    with pytest.raises(SlimError, match="tokenizer"):
        Trainer(tiny.llama(), args, train_dataset=data, callbacks=[callback], processing_class=other)


def test_data_that_was_not_stored_is_refused_before_the_first_step(tmp_path):
    folder = store(tmp_path / "store", freeze_(tiny.llama(seed=7)), tiny.text_data(rows=8))
    callback = DistillationCallback({"teacher": folder, "temperature": 2.0})
    trainer = tiny.trainer(tiny.llama(), tmp_path, [callback], tiny.text_data(rows=32))
    with pytest.raises(SlimError, match=r"Row 8 .*cache-teacher"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_store_cannot_be_mixed_with_other_teachers(tmp_path):
    folder = store(tmp_path / "store", freeze_(tiny.llama(seed=7)), tiny.text_data(rows=8))
    with pytest.raises(SlimError, match="cannot be mixed"):
        tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback({"teacher": [folder, "self"]})])
