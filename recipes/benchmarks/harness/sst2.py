"""SST-2 for an encoder: sentences with one of two labels, and the share that a classifier gets right."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 64  # no sentence of the training set is longer
BATCH_SIZE = 64


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
