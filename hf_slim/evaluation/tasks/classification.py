"""The task sequence-classification: texts or pairs of texts with one label each; measures accuracy."""

import itertools
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_slim.core.errors import SlimDataError, SlimError
from hf_slim.data import DataConfig
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.latency import batch_speed
from hf_slim.evaluation.quality import accuracy_and_loss
from hf_slim.evaluation.tasks.task import TASKS, Measures, Side, Task
from hf_slim.progress import progress

READ_AT_ONCE = 1000


def _columns(data: DataConfig) -> list[str]:
    return [*data.text_columns, data.label_column]


def _label_names(train: Dataset, data: DataConfig) -> list[str]:
    """Names of the classes: those of the dataset if it has names, else its sorted labels as text."""
    feature = train.features[data.label_column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = train.unique(data.label_column)
    if any(not isinstance(label, (int, str)) for label in found):
        odd = next(label for label in found if not isinstance(label, (int, str)))
        raise SlimDataError(
            f"'{data.label_column}' of '{data.source}' holds {odd!r}, which is not a class. Labels are whole numbers "
            "or texts: set `data.label_column`, or remove rows without a label."
        )
    if len(found) < 2:
        raise SlimDataError(f"Every example of '{data.source}' has the label {found[0]!r}: there is nothing to learn.")
    return [str(label) for label in sorted(found)]


def _set_padding_(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SlimError(
                "The tokenizer has no padding token and no end-of-text token to pad with. Set `tokenizer.pad_token`."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # decoders classify by the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id


def _examples(
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    label2id: dict[str, int],
    data: DataConfig,
    count: int,
    seed: int,
) -> Dataset:
    """Examples of at most `data.block_size` tokens, with the model's ids of their labels."""
    chosen = texts.shuffle(seed=seed).select(range(min(count, len(texts))))
    columns: dict[str, list] = {}
    starts = range(0, len(chosen), READ_AT_ONCE)
    for start in progress(starts, "reading text", "thousand examples"):
        rows = chosen[start : start + READ_AT_ONCE]
        words = [[text or "" for text in rows[column]] for column in data.text_columns]
        encoded = tokenizer(*words, truncation=True, max_length=data.block_size)
        for name, values in encoded.items():
            columns.setdefault(name, []).extend(values)
    columns["labels"] = _label_ids(chosen, label2id, data)
    return Dataset.from_dict(columns)


def _label_ids(rows: Dataset, label2id: dict[str, int], data: DataConfig) -> list[int]:
    """The model's ids of the labels: by name if the model has a label of that name; other numbers are ids."""
    feature = rows.features[data.label_column]
    known = {name.lower(): number for name, number in label2id.items()} | label2id
    ids = {}
    for label in rows.unique(data.label_column):
        is_named = isinstance(feature, ClassLabel) and label >= 0
        name = feature.names[label] if is_named else str(label)
        ids[label] = known.get(name, known.get(name.lower(), label))
        if not isinstance(ids[label], int) or not 0 <= ids[label] < len(label2id):
            raise SlimDataError(
                f"'{data.source}' has the label {name!r}, and the model knows {', '.join(label2id)}. Remove rows "
                "without a label, or use data and a model with the same labels."
            )
    return [ids[label] for label in rows[data.label_column]]


def _measure(
    sides: dict[str, Side], examples: dict[str, Dataset], data: DataConfig, settings: EvaluationConfig
) -> dict[str, Measures]:
    models = {name: side.model for name, side in sides.items()}
    size = settings.batch_size
    batches = {name: _full_batch(found, size, data.block_size) for name, found in examples.items()}
    samples = batch_speed(models, batches, settings.repeats)
    measured = {}
    for name, side in sides.items():
        accuracy, loss = accuracy_and_loss(side.model, examples[name], _collator(side.tokenizer), size, name)
        measured[name] = {
            "quality": {"accuracy": accuracy, "loss": loss, "examples": len(examples[name])},
            "inference": {"samples_per_s": samples[name], "batch_size": size, "tokens_per_sample": data.block_size},
        }
    return measured


def _full_batch(examples: Dataset, batch_size: int, length: int) -> Tensor:
    """Token ids `(batch_size, length)` of real text without padding, so that the speed is for exactly this size."""
    tokens = itertools.cycle(token for row in examples["input_ids"] for token in row)
    return torch.tensor(list(itertools.islice(tokens, batch_size * length))).reshape(batch_size, length)


def _collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer)


def _memory_input(data: DataConfig, settings: EvaluationConfig) -> dict[str, Any]:
    return {"input_ids": torch.ones(settings.batch_size, data.block_size, dtype=torch.long)}


TASKS.register("sequence-classification")(
    Task(
        auto_class=AutoModelForSequenceClassification,
        loss_counts_items=False,
        columns=_columns,
        label_names=_label_names,
        configure_=_set_padding_,
        examples=_examples,
        collator=_collator,
        held_out=lambda settings: settings.blocks * settings.batch_size,
        measure=_measure,
        memory_input=_memory_input,
    )
)
