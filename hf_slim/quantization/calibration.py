"""Second-order rounding (GPTQ) of the initial weights, on a few calibration batches before training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimDataError, SlimError
from hf_slim.core.modules import evaluating, temporary_hooks
from hf_slim.core.running.calibration import RunBatches, first_that_fit
from hf_slim.core.running.distributed import sum_over_ranks_
from hf_slim.progress import progress
from hf_slim.quantization.grids.gptq import gptq
from hf_slim.quantization.layers.scale_holders import rounding_disabled
from hf_slim.quantization.layers.training import FakeQuantLinear
from hf_slim.quantization.transform import fake_quantized_modules

HESSIAN_BYTES = 2**28  # memory for all Hessians of one pass; more layers need more passes over the batches


@torch.no_grad()
def round_by_gptq_(model: nn.Module, run_batches: RunBatches, observer: str) -> None:
    """Corrects the weights of every fake-quantized linear layer in place, so that rounding them gives GPTQ's result.

    Each pass over the batches covers as many layers as fit into `HESSIAN_BYTES`; layers of earlier passes are already
    rounded in it. Other kinds of layers are rounded to nearest. Modes, hooks and quantizers are restored at the end,
    also after an error; weights that an earlier pass corrected are not restored.

    Args:
        model: Prepared, with stored scales.
        run_batches: Runs the calibration batches through the model, one for each item that it yields.
    Raises: SlimError: if there is no batch, or a layer's inputs are not finite.
    """
    layers = {name: layer for name, layer in fake_quantized_modules(model).items() if _can_be_rounded(layer)}
    remaining = dict(layers)
    unrounded = rounding_disabled(layer.weight_quantizer for layer in layers.values())
    with progress(None, "rounding by GPTQ", "layer", total=len(layers)) as bar, evaluating(model), unrounded:
        while remaining:
            fitting = first_that_fit(
                {name: 4 * layer.in_features**2 for name, layer in remaining.items()}, HESSIAN_BYTES
            )
            hessians = _hessians(model, {name: remaining[name] for name in fitting}, run_batches)
            _require_finite(hessians)
            for name, hessian in hessians.items():
                layer = remaining.pop(name)
                corrected, state = gptq(layer.weight.float(), hessian, layer.scheme.weights, observer)
                layer.weight.copy_(corrected)
                layer.weight_quantizer.store_(state)
                layer.weight_quantizer.enabled = True  # later passes see this layer rounded
                bar.update()


def _require_finite(hessians: dict[str, Tensor]) -> None:
    """Raises SlimError for the first layer whose inputs are not finite, before any weight of the pass is changed."""
    for name, hessian in hessians.items():
        if not torch.isfinite(hessian).all():
            raise SlimError(f"The inputs of '{name}' are not finite on the calibration batches. Check the model.")


def _can_be_rounded(layer: nn.Module) -> bool:
    own_scales = isinstance(layer, FakeQuantLinear) and layer.weight_quantizer.scale is not None
    return own_scales and bool(layer.weight.numel()) and layer.weight_quantizer.codebook is None


def _hessians(model: nn.Module, layers: dict[str, FakeQuantLinear], run_batches: RunBatches) -> dict[str, Tensor]:
    found = {name: torch.zeros(2 * (layer.in_features,), device=layer.weight.device) for name, layer in layers.items()}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            with torch.autocast(rows.device.type, enabled=False):  # half precision ruins the sums
                found[name].addmm_(rows.t(), rows)

        return hook

    with temporary_hooks(layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()):
        batches = sum(1 for _ in run_batches())
    if not batches:
        raise SlimDataError("GPTQ needs calibration batches, and the training data has none. Check the dataset.")
    sum_over_ranks_(found.values())  # every rank must round in the same way
    return found
