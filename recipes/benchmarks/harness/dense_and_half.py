"""Speed of a dense model and of the same model without half of its multiply-adds, taken in turn."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from harness.results import Results, Values
from hf_slim import PruningConfig, convert, prepare
from hf_slim.evaluation.footprint import parameter_count
from hf_slim.evaluation.latency import inference_speed, interleaved_ms, spread
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.evaluation.training_speed import StepTiming, training_speed_of
from hf_slim.integration.loading import load_model, located
from hf_slim.pruning.budget.savings import layer_cost

HALF = {"target": {"macs": 0.5}, "round_to": {"ffn": 32}, "criterion": "l1"}  # which groups go does not change speed
PRECISIONS = ("fp32", "bf16")
Models = dict[str, PreTrainedModel]  # "dense" and "half"


@dataclass(frozen=True)
class Lengths:
    """Tokens and texts of a measurement.

    Attributes:
        tokens: Of a training step of the language model.
        prompts: Of its prefill; it decodes after the last.
        decode: Tokens that are decoded.
        texts, text_tokens: Of a batch of the encoder.
        token_ids: The smallest, and one more than the largest, that a text is made of.
    """

    tokens: int = 512
    prompts: tuple[int, int] = (256, 512)
    decode: int = 16
    texts: int = 32
    text_tokens: int = 128
    token_ids: tuple[int, int] = (1000, 20000)

    def as_dict(self) -> dict[str, Any]:
        """For the settings of the results."""
        return asdict(self)


def language_rows(results: Results, name: str, lengths: Lengths, training: dict[str, Any], repeats: int) -> None:
    """The rows "SmolLM2, size", "SmolLM2, inference" and "SmolLM2, training fp32", each with dense and half."""
    dense_and_half = lambda: {"dense": load_model(name), "half": half(load_model(name))}  # noqa: E731
    results("SmolLM2, size", lambda: _sizes(dense_and_half()))
    results("SmolLM2, inference", lambda: _inference(dense_and_half(), lengths, repeats))
    batch = batch_of(token_blocks(lengths.token_ids, 1, lengths.tokens))
    for precision in PRECISIONS:
        args = training | {"bf16": precision == "bf16"}
        measure = partial(training_speed_of, TASKS["causal-lm"])
        results(
            f"SmolLM2, training {precision}",  # new models each time: a Trainer leaves its precision on
            lambda measure=measure, args=args: measure(dense_and_half(), StepTiming(args, batch, repeats)),
        )


def encoder_rows(results: Results, name: str, lengths: Lengths, training: dict[str, Any], repeats: int) -> None:
    """The rows "MiniLM, inference" and "MiniLM, training fp32", each with dense and half."""
    dense_and_half = lambda: {"dense": _classifier(name), "half": half(_classifier(name))}  # noqa: E731
    texts = token_blocks(lengths.token_ids, lengths.texts, lengths.text_tokens, labels=2)
    results("MiniLM, inference", lambda: _throughput(dense_and_half(), texts, repeats))
    for precision in PRECISIONS:
        args = training | {"bf16": precision == "bf16", "per_device_train_batch_size": lengths.texts}
        measure = partial(training_speed_of, TASKS["sequence-classification"])
        results(
            f"MiniLM, training {precision}",
            lambda measure=measure, args=args: measure(dense_and_half(), StepTiming(args, batch_of(texts), repeats)),
        )


def half(model: PreTrainedModel) -> PreTrainedModel:
    """`model` without half of its multiply-adds, the same number of groups from every layer."""
    return convert(prepare(model, PruningConfig(**HALF)))


def token_blocks(token_ids: tuple[int, int], rows: int, length: int, labels: int | None = None) -> Dataset:
    """Random tokens: time does not depend on what they say. Labels are the tokens, or one of `labels` classes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(*token_ids, (rows, length), generator=generator)
    targets = torch.randint(0, labels, (rows,), generator=generator) if labels else ids
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": targets.tolist()})


def batch_of(blocks: Dataset) -> dict[str, torch.Tensor]:
    """All rows as one batch."""
    return blocks.with_format("torch")[:]


def _sizes(models: Models) -> Values:
    left = layer_cost(models["half"], "macs") / layer_cost(models["dense"], "macs")
    return {"multiply_adds_left": left} | {f"{name}_parameters": parameter_count(m) for name, m in models.items()}


def _inference(models: Models, lengths: Lengths, repeats: int) -> Values:
    """`{"prefill 256 ms": {"dense": spread, "half": spread}, ..., "decode tokens/s": ...}`."""
    values: Values = {}
    for tokens in lengths.prompts:
        prompt = torch.tensor(token_blocks(lengths.token_ids, 1, tokens)["input_ids"])
        for model in models.values():
            model.eval()
        found = inference_speed(models, dict.fromkeys(models, prompt), lengths.decode, repeats)
        values[f"prefill {tokens} ms"] = {name: speeds["prefill_ms"] for name, speeds in found.items()}
    values["decode tokens/s"] = {name: speeds["decode_tokens_per_s"] for name, speeds in found.items()}
    return values


def _throughput(models: Models, texts: Dataset, repeats: int) -> Values:
    inputs = torch.tensor(texts["input_ids"])
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        model.eval()
        calls[name] = torch.inference_mode()(lambda model=model: model(input_ids=inputs))
    samples = interleaved_ms(calls, repeats, "batches")
    return {"texts/s": {name: spread([len(texts) * 1000 / ms for ms in taken]) for name, taken in samples.items()}}


def _classifier(name: str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(located(name)[0], num_labels=2)
