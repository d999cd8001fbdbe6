"""Speed of structured pruning: what the callback costs while training, how fast smaller models are, and their making.

SmolLM2-135M and MiniLM-L6 on the CPU; both sides take turns in one process. Peaks of memory come from fresh processes.

    python recipes/benchmarks/pruning_speed.py                          # a quarter of an hour on 2 cores
    python recipes/benchmarks/pruning_speed.py --parts removal --repeats 3
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from harness.command import Run, parser_of, run_script
from harness.dense_and_half import HALF, Lengths, batch_of, encoder_rows, language_rows, token_blocks
from harness.results import Results, Values
from transformers import Trainer, TrainingArguments

from hf_slim import PruningCallback, PruningConfig, convert, prepare
from hf_slim.evaluation.footprint import peak_rss_bytes, ram_bytes
from hf_slim.evaluation.latency import interleaved_ms, spread
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.evaluation.training_speed import StepTiming, training_speed
from hf_slim.integration.loading import load_model
from hf_slim.pruning.importance.scores import observed, score_all
from hf_slim.pruning.transform import plan_pruning
from hf_slim.workflows.evaluate import in_fresh_process

CRITERIA = ("taylor", "wanda")
AMOUNTS = {"neurons": {"ffn": 0.5}, "neurons and heads": {"ffn": 0.5, "kv_heads": 0.34}}
TRAINING = {"per_device_train_batch_size": 1, "learning_rate": 1e-5, "use_cpu": True, "disable_tqdm": True}
SMOKE_LENGTHS = Lengths(tokens=64, prompts=(16, 32), decode=2, texts=4, text_tokens=16, token_ids=(5, 95))


class Bench:
    """One language model, one encoder.

    Args:
        causal, encoder: Names of the models.
    """

    def __init__(self, causal: str, encoder: str, lengths: Lengths, repeats: int):
        self.causal, self.encoder, self.lengths, self.repeats = causal, encoder, lengths, repeats

    def callback(self, results: Results, criteria: list[str]) -> None:
        """The rows "callback: neurons, taylor", ...: a plain step, one with the callback, scoring alone, memory."""
        for criterion in criteria:
            for what, sparsity in AMOUNTS.items():
                config = PruningConfig(sparsity, criterion=criterion)
                results(f"callback: {what}, {criterion}", lambda config=config: self._callback(config))

    def _callback(self, config: PruningConfig) -> Values:
        lengths = self.lengths
        steps = training_speed(
            TASKS["causal-lm"], load_model(self.causal), [config],
            StepTiming(
                TRAINING | {"bf16": True}, batch_of(token_blocks(lengths.token_ids, 1, lengths.tokens)), self.repeats
            ),
        )  # fmt: skip
        peaks = {name: in_fresh_process(_training_peak, self.causal, lengths, given)
                 for name, given in (("plain_peak_bytes", None), ("callback_peak_bytes", config))}  # fmt: skip
        return {"plain_ms": steps["base"], "callback_ms": steps["result"], "scoring_ms": self._scoring(config)} | peaks

    def _scoring(self, config: PruningConfig) -> Values:
        """Milliseconds of scoring all groups once."""
        model = load_model(self.causal)
        group_sets = plan_pruning(model, config).group_sets
        with observed(model, group_sets, config.criterion_by_kind) as seen:
            model(**batch_of(token_blocks(self.lengths.token_ids, 1, self.lengths.tokens))).loss.backward()
        calls = {"": lambda: score_all(model, group_sets, config.criterion_by_kind, seen)}
        return spread(interleaved_ms(calls, self.repeats, "scoring")[""])

    def speed(self, results: Results) -> None:
        """Dense models against the same without half of their transformer's multiply-adds."""
        language_rows(results, self.causal, self.lengths, TRAINING, self.repeats)
        encoder_rows(results, self.encoder, self.lengths, TRAINING, self.repeats)

    def removal(self, results: Results) -> None:
        """Finding the structure and removing 40% of the language model, in a fresh process each time."""
        results("removal of 40%", self._removal)

    def _removal(self) -> Values:
        with tempfile.TemporaryDirectory() as folder:
            load_model(self.causal).save_pretrained(folder)
            found = [in_fresh_process(_removed_once, folder) for _ in range(self.repeats)]
        seconds, peaks = (spread(list(column)) for column in zip(*found, strict=True))
        return {"seconds": seconds, "peak_of_model_bytes": peaks}


def _training_peak(name: str, lengths: Lengths, config: PruningConfig | None) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(scratch, max_steps=4, bf16=True, save_strategy="no", report_to="none", **TRAINING)
        callbacks = [PruningCallback(config)] if config else []
        data = token_blocks(lengths.token_ids, 4, lengths.tokens)
        Trainer(load_model(name), args, train_dataset=data, callbacks=callbacks).train()
    return peak_rss_bytes()


def _removed_once(folder: str) -> tuple[float, float]:
    """Seconds, and the peak of memory as a multiple of the model's bytes."""
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


def main(run: Run) -> None:
    """Measures the parts that the command line selects."""
    options = run.options
    lengths = SMOKE_LENGTHS if options.smoke else Lengths()
    settings: dict[str, Any] = {"models": ["SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"], "half": HALF}
    results = run.results("pruning_speed", settings | {"lengths": lengths.as_dict()})
    bench = Bench(run.inputs.causal, run.inputs.encoder, lengths, options.repeats)
    if "callback" in options.parts:
        bench.callback(results, options.criteria)
    if "speed" in options.parts:
        bench.speed(results)
    if "removal" in options.parts:
        bench.removal(results)


PARTS = ("callback", "speed", "removal")

if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side (default: 7)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=CRITERIA, help="of the callback")
    run_script(parser, main, smoke={"repeats": 1, "criteria": ["taylor"]})
