"""Quality of quantization-aware training against torchao's: the share of the rounding gap that training recovers.

SmolLM2-135M, weights only, symmetric groups of 64, the same data, steps, seed and learning rate for both sides.

    python recipes/benchmarks/quantization_quality.py                    # needs torchao; about an hour on 2 cores
    python recipes/benchmarks/quantization_quality.py --grids w3a16 --teachers none

gap = perplexity of the fine-tuned float model rounded to nearest - its perplexity unrounded; recovered = the share of
it that training on the grid saves. Finished rows are kept, so that an interrupted run goes on.
"""

from collections.abc import Callable

import torch
from harness.command import Run, parser_of, run_script
from harness.fine_tune import SEED, FineTune, add_options, settings_of
from harness.results import Results, Values
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_slim import DistillationCallback, QuantizationCallback, QuantizationConfig, prepare

GROUP_SIZE = 64
OURS = {"group_size": GROUP_SIZE, "observer": "mse", "initialize": "gptq", "learn": "lsq"}
TEACHING = {"teacher": "self", "alpha": 0.5}
BITS = {"w4a16": torch.int4, "w3a16": torch.int3, "w2a16": torch.int2}
TEACHERS = {"none": "", "self": ", taught"}  # option -> how it shows in the name of a row
SIDES = ("torchao", "hf_slim")


class Bench:
    """One fine-tune, many ways to quantize."""

    def __init__(self, fine_tune: FineTune):
        self.fine_tune = fine_tune

    def references(self, grids: list[str]) -> dict[str, Values]:
        """The fine-tuned float model, and the same rounded to nearest on every grid."""
        state = self.fine_tune.trained(self.fine_tune.model(), []).state_dict()
        found = {"float": self._judged(self._with_state(state))}
        for grid in grids:
            rounded = prepare(self._with_state(state), QuantizationConfig(grid, group_size=GROUP_SIZE))
            found[f"{grid} rounded to nearest"] = self._judged(rounded)
        return found

    def hf_slim(self, grid: str, taught: bool) -> Values:
        """Trained on the grid by the callback."""
        callbacks = [*_teacher(taught), _KeepPrepared(QuantizationConfig(grid, **OURS))]
        return self._judged(self.fine_tune.trained(self.fine_tune.model(), callbacks))

    def torchao(self, grid: str, taught: bool) -> Values:
        """Trained on the grid by torchao's quantization-aware training."""
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weights = IntxFakeQuantizeConfig(BITS[grid], group_size=GROUP_SIZE, is_symmetric=True)
        config = QATConfig(weight_config=weights, step="prepare")
        prepare_later = _PrepareLater(lambda model: quantize_(model, config, filter_fn=_is_inner_linear))
        return self._judged(self.fine_tune.trained(self.fine_tune.model(), [*_teacher(taught), prepare_later]))

    def _judged(self, model: nn.Module) -> Values:
        return {"perplexity": self.fine_tune.perplexity(model)}

    def _with_state(self, state: dict[str, torch.Tensor]) -> PreTrainedModel:
        model = self.fine_tune.model()
        model.load_state_dict(state)
        return model


class _KeepPrepared(QuantizationCallback):
    """Leaves the model fake-quantized at the end, which computes exactly what the packed one would."""

    def on_train_end(self, *args, **kwargs) -> None:
        pass


class _PrepareLater(TrainerCallback):
    """Prepares after the teacher has copied the untouched model."""

    def __init__(self, prepare_model: Callable[[nn.Module], None]):
        self.prepare_model = prepare_model

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        self.prepare_model(model)


def _teacher(taught: bool) -> list[TrainerCallback]:
    return [DistillationCallback(TEACHING)] if taught else []


def _is_inner_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def fill(results: Results, bench: Bench, grids: list[str], teachers: list[str], sides: list[str]) -> None:
    """The rows "float", "w4a16 rounded to nearest", "w4a16 torchao", "w4a16 hf_slim, taught", ..."""
    results.together(["float", *(f"{grid} rounded to nearest" for grid in grids)], lambda: bench.references(grids))
    for teacher in teachers:
        for grid in grids:
            for side in sides:
                measure = getattr(bench, side)
                taught = teacher == "self"
                results(
                    f"{grid} {side}{TEACHERS[teacher]}",
                    lambda measure=measure, grid=grid, taught=taught: measure(grid, taught),
                )


def main(run: Run) -> None:
    """Measures what the command line selects."""
    options = run.options
    torch.set_num_threads(1)
    sides = [side for side in options.sides if side != "torchao" or run.has_peer("torchao")]
    settings = settings_of(options) | {"model": "SmolLM2-135M-Instruct", "group_size": GROUP_SIZE}
    settings |= {"hf_slim": OURS, "teacher": TEACHING}
    results = run.results("quantization_quality", settings, [SEED], ["torchao"])
    bench = Bench(FineTune(run.inputs, options.steps, options.blocks, options.learning_rate))
    fill(results, bench, options.grids, options.teachers, sides)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    add_options(parser)
    parser.add_argument("--grids", nargs="+", default=["w4a16", "w3a16"], choices=list(BITS))
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    run_script(parser, main, smoke={"steps": 2, "blocks": 1, "grids": ["w3a16"]})
