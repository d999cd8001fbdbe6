"""How much accuracy a pruned encoder keeps: MiniLM-L6 on SST-2 without half, and three quarters, of heads and neurons.

Every row is a fine-tune of the same length: "dense" starts from the pretrained weights, the others go on from an
earlier row; where groups are removed, the dense model teaches. Pruning is gradual, and chooses across layers. The
dense model is trained on as well, by itself and taught; the pruned ones are compared with the best of the three.

    python recipes/benchmarks/pruning_encoder.py                    # 50 minutes on one core

SST-2 is read from `$HF_SLIM_DATA/sst2`, or else from the Hub. Finished rows, and their models in `runs/benchmarks`,
are kept, so that an interrupted run goes on.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness.command import Run, parser_of, run_script
from harness.results import Values
from harness.sst2 import BATCH_SIZE, accuracy, default_data, load_classifier, sst2
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from hf_slim import DistillationCallback, PruningCallback
from hf_slim.integration.loading import located

SEED = 0
DISTILLATION = {"alpha": 0.7, "temperature": 2.0}
PRUNING = {"criterion": "taylor", "uniform": False, "floor": 0.08, "start": 0.02, "stop": 0.4}


@dataclass(frozen=True)
class Row:
    """One fine-tune.

    Attributes:
        start: The row whose model it starts from; None: the pretrained weights.
        removed: Share of the heads and of the neurons of that model which is removed.
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

    def __init__(self, model: str, data: str, epochs: float, learning_rate: float, folder: Path):
        self.epochs, self.learning_rate, self.folder = epochs, learning_rate, folder
        self.pretrained = located(model)[0]
        self.tokenizer = AutoTokenizer.from_pretrained(self.pretrained)
        self.train, self.held_out = sst2(data, self.tokenizer)

    def measured(self, name: str) -> Values:
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
        torch.manual_seed(SEED)  # the new classifier
        model = load_classifier(self.model_folder(row.start) if row.start else self.pretrained)
        callbacks: list[TrainerCallback] = []
        if row.taught:
            teacher = load_classifier(self.model_folder("dense")).requires_grad_(False)
            callbacks.append(DistillationCallback(DISTILLATION, teacher=teacher))
        if row.removed:
            sparsity = {"ffn": row.removed, "kv_heads": row.removed}
            callbacks.append(PruningCallback(PRUNING | {"sparsity": sparsity}))
        args = TrainingArguments(
            str(self.folder), num_train_epochs=self.epochs, per_device_train_batch_size=BATCH_SIZE,
            learning_rate=self.learning_rate, warmup_steps=0.06, weight_decay=0.01, bf16=True, seed=SEED,
            train_sampling_strategy="group_by_length", save_strategy="no", logging_steps=100,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        collator = DataCollatorWithPadding(self.tokenizer)
        trainer = Trainer(model, args, train_dataset=self.train, data_collator=collator, callbacks=callbacks)
        trainer.train()
        return trainer


def main(run: Run) -> None:
    """Trains and measures every row that is missing."""
    options = run.options
    torch.set_num_threads(1)
    data = options.data or default_data()
    bench = Bench(run.inputs.encoder, data, options.epochs, options.learning_rate, run.scratch / "pruning_encoder")
    settings = {"model": "all-MiniLM-L6-v2", "data": "SST-2"}
    settings |= {key: vars(options)[key] for key in ("epochs", "learning_rate")}
    settings |= {"distillation": DISTILLATION, "pruning": PRUNING}
    results = run.results("pruning_encoder", settings, [SEED])
    for name, row in ROWS.items():
        results(name, lambda name=name, row=row: bench.measured(name) | asdict(row))


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--data", help="SST-2: a folder, or a name `load_dataset` takes (default: as above)")
    parser.add_argument("--epochs", type=float, default=1.0, help="per row (default: 1)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    run_script(parser, main)
