"""Quality of structured pruning against Torch-Pruning's: held-out perplexity after the same short recovery.

SmolLM2-135M; the same data, steps, seed and learning rate for both sides. A share counts the parameters of the
transformer: all of them but the token embedding, which neither side prunes.

    python recipes/benchmarks/pruning_quality.py                          # needs torch-pruning; an hour on 2 cores
    python recipes/benchmarks/pruning_quality.py --shares 0.2 --sides torch_pruning
    python recipes/benchmarks/pruning_quality.py --criteria               # which of its criteria Torch-Pruning gets

`--criteria` writes a file of its own, `pruning_torch_pruning_criteria.json`. Finished rows are kept, so that an
interrupted run goes on.
"""

import torch
from harness.command import Run, parser_of, run_script
from harness.fine_tune import SEED, FineTune, add_options, settings_of
from harness.results import Results, Values
from harness.torch_pruning import BEST_SETUP, SETUPS, Setup, torch_pruned, transformer_parameters
from transformers import PreTrainedModel

from hf_slim import PruningCallback, PruningConfig, prune

CALIBRATION_BLOCKS = 16  # training blocks that Torch-Pruning's criteria see before it prunes
CRITERIA_BLOCKS = 4  # held-out blocks that choose among them
CRITERIA_SHARE = 0.2
# neurons alone, as Torch-Pruning does here: SmolLM2 has three key-value heads a layer, and every one is dear
OURS = {"criterion": "fisher_mask", "spend_on": ["ffn"], "calibration_batches": 48, "repair": True}
PEERS = ("torch-pruning",)
SIDES = ("torch_pruning", "hf_slim uniform", "hf_slim")


class Bench:
    """One fine-tune, two ways to prune."""

    def __init__(self, fine_tune: FineTune):
        self.fine_tune = fine_tune
        self.dense_parameters = transformer_parameters(fine_tune.model())

    def rows(self, shares: list[float], sides: list[str], results: Results) -> None:
        """Fills "untouched", "fine-tuned", "torch_pruning 0.2", "hf_slim uniform 0.2", ..."""
        fine_tune = self.fine_tune
        results("untouched", lambda: {"perplexity": fine_tune.perplexity(fine_tune.model())})
        results("one shot", self._one_shot)
        results("fine-tuned", lambda: {"perplexity": fine_tune.perplexity(fine_tune.trained(fine_tune.model(), []))})
        for share in shares:
            for side in sides:
                results(f"{side} {share}", lambda share=share, side=side: self._pruned(side, share))

    def criteria(self, setups: dict[str, Setup], results: Results) -> None:
        """Fills "L2", "Taylor", ...: perplexity of one-shot pruning, not recovered."""
        for name, setup in setups.items():
            results(name, lambda setup=setup: self._torch_pruned(setup, CRITERIA_SHARE)[1])

    def _pruned(self, side: str, share: float) -> Values:
        if side != "torch_pruning":
            return self._ours(share, uniform=side.endswith("uniform"))
        model, values = self._torch_pruned(SETUPS[BEST_SETUP], share)
        return values | {"perplexity": self.fine_tune.perplexity(self.fine_tune.trained(model, []))}

    def _ours(self, share: float, uniform: bool) -> Values:
        config = OURS | {"target": {"parameters": 1 - share}, "uniform": uniform}
        model = self.fine_tune.trained(self.fine_tune.model(), [PruningCallback(config)])
        return {"removed": self._removed_share(model), "perplexity": self.fine_tune.perplexity(model)}

    def _torch_pruned(self, setup: Setup, share: float) -> tuple[PreTrainedModel, Values]:
        calibration = self.fine_tune.calibration(CALIBRATION_BLOCKS)
        model = torch_pruned(self.fine_tune.model(), setup, share, calibration)
        return model, {"removed": self._removed_share(model), "one_shot": self.fine_tune.perplexity(model)}

    def _one_shot(self) -> Values:
        """A quarter of the neurons, chosen across layers, without any training."""
        settings = {key: OURS[key] for key in ("criterion", "calibration_batches", "repair")}
        rows = self.fine_tune.calibration(OURS["calibration_batches"])
        model = self.fine_tune.model()
        batches = [{"input_ids": row[None], "labels": row[None]} for row in rows]
        prune(model, PruningConfig({"ffn": 0.25}, uniform=False, **settings), batches)
        return {"perplexity": self.fine_tune.perplexity(model)}

    def _removed_share(self, model: PreTrainedModel) -> float:
        """Share of the original transformer's parameters that `model` lacks."""
        return 1 - transformer_parameters(model) / self.dense_parameters


def main(run: Run) -> None:
    """Measures what the command line selects."""
    options = run.options
    torch.set_num_threads(1)
    has_peer = run.has_peer("torch-pruning") if options.criteria or "torch_pruning" in options.sides else False
    sides = [side for side in options.sides if side != "torch_pruning" or has_peer]
    blocks = CRITERIA_BLOCKS if options.criteria else options.blocks
    train_blocks = max(CALIBRATION_BLOCKS, OURS["calibration_batches"])
    bench = Bench(FineTune(run.inputs, options.steps, blocks, options.learning_rate, train_blocks))
    settings = {"model": "SmolLM2-135M-Instruct", "torch_pruning_calibration_blocks": CALIBRATION_BLOCKS}
    if not options.criteria or options.smoke:
        rows = run.results("pruning_quality", settings_of(options) | settings | {"hf_slim": OURS}, [SEED], PEERS)
        bench.rows(options.shares, sides, rows)
    if (options.criteria or options.smoke) and has_peer:
        settings |= {"share": CRITERIA_SHARE, "blocks": CRITERIA_BLOCKS}
        # Torch-Pruning does not come to an end when it removes heads of the tiny model
        setups = {name: setup for name, setup in SETUPS.items() if not (options.smoke and setup.query_heads)}
        bench.criteria(setups, run.results("pruning_torch_pruning_criteria", settings, [SEED], PEERS))


if __name__ == "__main__":
    parser = parser_of(__doc__)
    add_options(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.4], help="of the transformer (0.2 0.4)")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--criteria", action="store_true", help="compare Torch-Pruning's criteria, one shot")
    run_script(parser, main, smoke={"steps": 2, "blocks": 1, "shares": [0.2]})
