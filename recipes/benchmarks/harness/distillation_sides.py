"""The sides of `distillation_speed.py`: one training step of a tiny Llama, taught in every way that is compared."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers import default_data_collator as collate

from hf_slim import DistillationCallback
from hf_slim.distillation.store.format import StoreInfo
from hf_slim.distillation.store.writer import StoredTeacherWriter, finish_store
from hf_slim.distillation.teachers.live import LiveTeacher, TeacherRequest, freeze_

TOP_K = 64


@dataclass(frozen=True)
class Sizes:
    """Of the models and of a batch.

    Attributes:
        student, teacher: Hidden size, neurons, layers and heads.
        rows, length: Texts of a batch, and tokens of each.
    """

    student: tuple[int, int, int, int] = (256, 768, 3, 4)
    teacher: tuple[int, int, int, int] = (576, 1536, 5, 9)
    vocabulary: int = 49152
    rows: int = 4
    length: int = 256

    def as_dict(self) -> dict[str, Any]:
        """For the settings of the results."""
        return asdict(self)


SIZES = Sizes()
SMOKE_SIZES = Sizes((32, 64, 1, 4), (48, 96, 2, 4), vocabulary=95, rows=2, length=32)


def llama(vocabulary: int, hidden: int, neurons: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Random weights: time does not depend on what they say."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
        )
    )  # fmt: skip


def student(sizes: Sizes) -> LlamaForCausalLM:
    """The one that is trained."""
    return llama(sizes.vocabulary, *sizes.student)


def teacher(sizes: Sizes) -> LlamaForCausalLM:
    """Frozen."""
    return freeze_(llama(sizes.vocabulary, *sizes.teacher))


def blocks(sizes: Sizes) -> Dataset:
    """One batch of random tokens."""
    shape, generator = (sizes.rows, sizes.length), torch.Generator().manual_seed(0)
    ids = torch.randint(0, sizes.vocabulary, shape, generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * sizes.length] * sizes.rows})


def plain(folder: str, sizes: Sizes) -> Trainer:
    """Without a teacher."""
    return Trainer(student(sizes), arguments(folder, sizes), train_dataset=blocks(sizes))


def ours(folder: str, sizes: Sizes, losses: str) -> Trainer:
    """hf_slim, with the teacher in memory."""
    callback = DistillationCallback({"losses": losses}, teacher=teacher(sizes))
    return Trainer(student(sizes), arguments(folder, sizes), train_dataset=blocks(sizes), callbacks=[callback])


def stored(folder: str, sizes: Sizes, losses: str) -> Trainer:
    """hf_slim, with the teacher's answers on disk."""
    store_answers(teacher(sizes), [blocks(sizes)], Path(folder) / "store", sizes)
    callback = DistillationCallback({"losses": losses, "teacher": f"{folder}/store"})
    return Trainer(student(sizes), arguments(folder, sizes), train_dataset=blocks(sizes), callbacks=[callback])


def gkd(folder: str, sizes: Sizes, beta: float) -> Trainer:
    """TRL."""
    from trl.experimental.gkd import GKDTrainer

    class LossOfGKD(Trainer):
        """TRL's loss in a plain Trainer."""

        compute_loss = GKDTrainer.compute_loss
        generalized_jsd_loss = staticmethod(GKDTrainer.generalized_jsd_loss)

    trainer = LossOfGKD(student(sizes), arguments(folder, sizes), train_dataset=blocks(sizes))
    trainer.teacher_model, trainer.beta = teacher(sizes), beta
    return trainer


def arguments(folder: str, sizes: Sizes) -> TrainingArguments:
    """Of every side."""
    return TrainingArguments(
        folder, max_steps=2, disable_tqdm=True, report_to="none", per_device_train_batch_size=sizes.rows,
        learning_rate=1e-4, use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip


def store_answers(
    model: PreTrainedModel, data: list[Dataset], folder: Path, sizes: Sizes, dtype: torch.dtype | None = None
) -> None:
    """Stores what `model` answers to every row, as `hf-slim cache-teacher` does."""
    vocabulary = model.config.vocab_size
    info = StoreInfo(min(TOP_K, vocabulary), vocabulary, "token", 1.0, str(dtype or "float32"), "", "")
    live = LiveTeacher(model)
    with StoredTeacherWriter(folder, info) as writer:
        for rows in data:
            for start in range(0, len(rows), sizes.rows):
                batch = collate([rows[index] for index in range(start, min(start + sizes.rows, len(rows)))])
                predictions = live.forward(batch, TeacherRequest(dtype)).predictions
                logits = predictions.at(torch.arange(len(predictions.states))).states
                writer.add(batch, logits.unflatten(0, batch["input_ids"].shape))
    finish_store(folder, info)
