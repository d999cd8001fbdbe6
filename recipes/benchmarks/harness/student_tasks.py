"""What a student learns in `distillation_quality.py`: classifying texts, or writing stories."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from harness.inputs import Inputs
from hf_slim import DistillationCallback
from hf_slim.data import DataConfig, load_texts, text_blocks
from hf_slim.evaluation.quality import accuracy_and_loss, perplexity
from hf_slim.integration.loading import load_model, load_tokenizer

DATA_SEED = 42
TRIAL_TEXTS, TRIAL_BLOCKS = 2000, 16  # training texts that only `--trial` reads
ALONE, GKD, OURS = "alone", "GKD", "hf_slim"
COSINE, SQUARES = {"loss": "cosine", "layers": "even"}, {"loss": "mse", "layers": "even", "weight": 200.0}
CLASSIFIER_CANDIDATES = {
    ALONE: None,
    "answers": {"alpha": 0.9, "temperature": 2.0},
    "cosine of hidden states": {"alpha": 0.9, "temperature": 2.0, "hidden": COSINE},
    "squares of hidden states": {"alpha": 0.9, "temperature": 2.0, "hidden": SQUARES},
}
CAUSAL_CANDIDATES = {f"alpha {alpha}": {"alpha": alpha, "hidden": COSINE} for alpha in (0.5, 0.9)}
CLASSIFIER, CAUSAL = CLASSIFIER_CANDIDATES["squares of hidden states"], CAUSAL_CANDIDATES["alpha 0.9"]


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast. Steps are optimizer steps."""

    teacher_steps: int
    steps: int
    batch_size: int
    teacher_rate: float
    learning_rate: float

    def scaled(self, share: float) -> "Schedule":
        """The same with that share of the steps."""
        teacher_steps, steps = (max(1, round(share * count)) for count in (self.teacher_steps, self.steps))
        return Schedule(teacher_steps, steps, self.batch_size, self.teacher_rate, self.learning_rate)


class Classification:
    """MiniLM-L6 on texts with labels.

    Args:
        name: The folder of the data.
        column: That of the texts.
    """

    unit, candidates, settings, sides = "accuracy", CLASSIFIER_CANDIDATES, CLASSIFIER, (ALONE, OURS)
    trial_steps, from_teacher = 500, False

    def __init__(self, model: str, name: str, evaluation_split: str, column: str, schedule: Schedule):
        self.model, self.name, self.schedule = model, name, schedule
        self.students = {"2 layers": 1 / 3, "3 layers": 1 / 2}
        data = DataConfig(f"$HF_SLIM_DATA/{name}", text_column=column, evaluation_split=evaluation_split)
        self.tokenizer = load_tokenizer(model)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        train, held_out = load_texts(data, [column, data.label_column])
        self.labels = [str(label) for label in sorted(train.unique(data.label_column))]
        shuffled, n_trial = train.shuffle(seed=DATA_SEED), min(TRIAL_TEXTS, len(train) // 5)
        self.trial = self._encoded(shuffled.select(range(n_trial)), data)
        self.train = self._encoded(shuffled.select(range(n_trial, len(shuffled))), data)
        self.held_out = self._encoded(held_out, data)

    def _encoded(self, rows: Dataset, data: DataConfig) -> Dataset:
        ids = self.tokenizer(list(rows[data.text_columns[0]]), truncation=True, max_length=48)["input_ids"]
        columns = {"input_ids": ids, "length": [len(each) for each in ids], "labels": rows[data.label_column]}
        return Dataset.from_dict(columns)

    def load(self, spec: str | None = None) -> PreTrainedModel:
        """The pretrained model, or another of that kind; the head is new if there is none."""
        return load_model(spec or self.model, auto_class=AutoModelForSequenceClassification, label_names=self.labels)

    def trainer(
        self, model: PreTrainedModel, args: dict[str, Any], side: str, teacher: PreTrainedModel | None
    ) -> Trainer:
        """Which `teacher` teaches, unless it is None."""
        args = TrainingArguments(**args, train_sampling_strategy="group_by_length")
        callbacks = [DistillationCallback(self.settings, teacher=teacher)] if teacher else []
        return Trainer(model, args, train_dataset=self.train, data_collator=self.collate, callbacks=callbacks)

    def score(self, model: PreTrainedModel, texts: Dataset | None = None) -> dict[str, float]:
        """Share of labels that are right among the held-out texts, unless others are given.

        In float32, or in the bf16 autocast that a Trainer leaves on the model it trained.
        """
        texts = (texts or self.held_out).sort("length")  # sorted: little padding
        return {"accuracy": accuracy_and_loss(model, texts, self.collate, 64, self.name)[0]}


class Language:
    """SmolLM2 on blocks of text."""

    unit, candidates, settings, sides = "perplexity", CAUSAL_CANDIDATES, CAUSAL, (ALONE, OURS, GKD)
    trial_steps, from_teacher = 32, True

    def __init__(self, model: str, name: str, n_held_out: int, schedule: Schedule):
        self.model, self.name, self.schedule, self.students = model, name, schedule, {"15 layers": 1 / 2}
        self.tokenizer = load_tokenizer(model)
        data = DataConfig(f"$HF_SLIM_DATA/{name}", block_size=256)
        train, held_out = load_texts(data)
        blocks = text_blocks(train, self.tokenizer, data, len(train), DATA_SEED, "reading training text")
        n_trial = min(TRIAL_BLOCKS, len(blocks) // 5)
        self.trial, self.train = blocks.select(range(n_trial)), blocks.select(range(n_trial, len(blocks)))
        self.held_out = text_blocks(held_out, self.tokenizer, data, n_held_out, 0, "reading held-out text")

    def load(self, spec: str | None = None) -> PreTrainedModel:
        """The pretrained model, or another of that kind, in evaluation mode."""
        return load_model(spec or self.model)

    def trainer(
        self, model: PreTrainedModel, args: dict[str, Any], side: str, teacher: PreTrainedModel | None
    ) -> Trainer:
        """Which `teacher` teaches, as `side` does it, unless it is None."""
        if side == GKD:
            return self._gkd(model, args, teacher)
        callbacks = [DistillationCallback(self.settings, teacher=teacher)] if teacher else []
        data = {"train_dataset": self.train, "data_collator": default_data_collator}
        return Trainer(model, TrainingArguments(**args), **data, callbacks=callbacks)

    def _gkd(self, model: PreTrainedModel, args: dict[str, Any], teacher: PreTrainedModel) -> Trainer:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        masks = [[1] * len(block) for block in self.train["input_ids"]]  # it reads a mask, and its collator only chats
        args = GKDConfig(**args, lmbda=0.0, gradient_checkpointing=False)
        return GKDTrainer(
            model, teacher, args, default_data_collator, self.train.add_column("attention_mask", masks),
            processing_class=self.tokenizer,
        )  # fmt: skip

    def score(self, model: PreTrainedModel, blocks: Dataset | None = None) -> dict[str, float]:
        """Perplexity of the held-out blocks, unless others are given; precision as in `Classification.score`."""
        return {"perplexity": perplexity(model, blocks or self.held_out)}


Task = Classification | Language
SCHEDULES = {
    "sst2": Schedule(2000, 500, 32, 1e-4, 3e-4),
    "banking77": Schedule(1500, 500, 32, 3e-4, 6e-4),
    "tinystories": Schedule(48, 64, 1, 3e-5, 5e-4),
}


def task_of(name: str, inputs: Inputs) -> Task:
    """With its data."""
    schedule = SCHEDULES[name]
    if name == "sst2":
        return Classification(inputs.encoder, name, "validation", "sentence", schedule)
    if name == "banking77":
        return Classification(inputs.encoder, name, "test", "text", schedule)
    return Language(inputs.causal, name, 24, schedule)
