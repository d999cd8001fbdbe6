"""Sensitivity to low precision: the loss increase of each scheme in each layer, and the choice within a budget."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_slim.core.errors import SlimConfigError, SlimDataError
from hf_slim.core.modules import evaluating, temporary_module
from hf_slim.progress import progress
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.layers.families import family_of
from hf_slim.quantization.layers.training import Training
from hf_slim.quantization.plan import plan_quantization
from hf_slim.quantization.scheme import Scheme


@dataclass(frozen=True)
class SchemeTrial:
    """One scheme for one layer.

    Attributes:
        bits: Bits per weight, scales included.
        loss_increase: Increase of the task loss, nats per token; may be negative by chance.
        divergence: KL(original model || model with this scheme), nats per token; it has no noise from labels.
    """

    scheme: str
    bits: float
    loss_increase: float
    divergence: float


@dataclass(frozen=True)
class LayerSensitivity:
    """The trials of all schemes that fit one layer, which has `weights` weights."""

    name: str
    weights: int
    choices: tuple[SchemeTrial, ...]


@torch.inference_mode()
def measure_sensitivity(
    model: nn.Module, blocks: Iterable[Tensor], schemes: list[str], ignore: tuple[str, ...] = ()
) -> list[LayerSensitivity]:
    """The loss increase of each scheme in each layer, with all other layers in floating point.

    The model is restored at the end, also after an error.

    Args:
        model: A causal language model with float weights.
        blocks: Token ids, each `(1, n_tokens)`.
        schemes: Names of schemes; a layer skips those that do not fit its sizes.
        ignore: Patterns of layers that remain in floating point.
    """
    blocks = list(blocks)
    if not blocks:
        raise SlimDataError("Sensitivity is measured on text, and there is none. Check the data.")
    fitting = {name: _fitting(model, name, schemes) for name in _layers(model, ignore)}
    total, found = sum(map(len, fitting.values())), []
    with evaluating(model), progress(None, "measuring sensitivity", "scheme", total=total) as bar:
        untouched = [_predictions(model, ids) for ids in blocks]
        for name, candidates in fitting.items():
            layer, choices = model.get_submodule(name), []
            weights = sum(rows * columns for rows, columns in family_of(layer).shapes(layer).values())
            for scheme in candidates:
                choices.append(_choice(model, name, scheme, blocks, untouched))
                bar.update()
            found.append(LayerSensitivity(name, weights, tuple(choices)))
    return found


def choose_schemes(sensitivities: list[LayerSensitivity], budget_bits: float) -> dict[str, str]:
    """A scheme for each layer, with the smallest summed divergence whose mean bits per weight are within the budget.

    Starts from the most precise schemes and repeats the step to a coarser scheme that costs the least divergence per
    saved bit, until the budget is met. On the convex hull of each layer's choices this is optimal up to the last step.
    Raises: SlimError: if even the coarsest schemes exceed the budget.
    """
    total = sum(layer.weights for layer in sensitivities)
    hulls = {layer.name: _hull(layer.choices) for layer in sensitivities}
    weights = {layer.name: layer.weights for layer in sensitivities}
    coarsest = sum(weights[name] * hull[-1].bits for name, hull in hulls.items()) / total
    if coarsest > budget_bits:
        raise SlimConfigError(
            f"A budget of {budget_bits:g} bits per weight cannot be met: the coarsest of these schemes take "
            f"{coarsest:.2f}. Raise the budget or add a coarser scheme."
        )
    position = dict.fromkeys(hulls, 0)
    spent = sum(weights[name] * hull[0].bits for name, hull in hulls.items())
    while spent > budget_bits * total:
        steps = [
            ((hull[i + 1].divergence - hull[i].divergence) / (hull[i].bits - hull[i + 1].bits) / weights[name], name)
            for name, hull in hulls.items()
            if (i := position[name]) + 1 < len(hull)
        ]
        _, name = min(steps)
        hull, i = hulls[name], position[name]
        spent -= weights[name] * (hull[i].bits - hull[i + 1].bits)
        position[name] += 1
    return {name: hulls[name][i].scheme for name, i in position.items()}


def _hull(choices: tuple[SchemeTrial, ...]) -> list[SchemeTrial]:
    """The choices on the lower convex hull of divergence over bits, most precise first."""
    hull: list[SchemeTrial] = []
    for choice in sorted(choices, key=lambda choice: (choice.bits, choice.divergence)):
        if hull and choice.divergence >= hull[-1].divergence:
            continue  # more bits without a smaller divergence
        while len(hull) > 1 and _slope(hull[-2], choice) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull[::-1]


def _slope(low: SchemeTrial, high: SchemeTrial) -> float:
    return (high.divergence - low.divergence) / (high.bits - low.bits)


def _layers(model: nn.Module, ignore: tuple[str, ...]) -> list[str]:
    plans = plan_quantization(model, QuantizationConfig("w8a16", ignore=ignore))
    return [plan.name for plan in plans if plan.scheme]


def _fitting(model: nn.Module, name: str, schemes: list[str]) -> list[Scheme]:
    layer = model.get_submodule(name)
    shapes = family_of(layer).shapes(layer).values()
    candidates = [family_of(layer).fitting(Scheme.parse(scheme)) for scheme in schemes]
    fitting = [s for s in candidates if not any(cols % (s.weights.group_size or 1) for _, cols in shapes)]
    fitting = [scheme for scheme in fitting if not scheme.weights.kind_of.learns_codebook]
    if not fitting:
        raise SlimConfigError(
            f"None of the schemes {', '.join(schemes)} fits the sizes of '{name}'. Add one, or ignore it."
        )
    return fitting


def _choice(model: nn.Module, name: str, scheme: Scheme, blocks: list[Tensor], untouched: list[Tensor]) -> SchemeTrial:
    """The trial of `scheme` in layer `name` alone, compared with the predictions of the original model."""
    layer = model.get_submodule(name)
    with temporary_module(model, name, family_of(layer).fake_quantized(layer, scheme, Training())):
        now = [_predictions(model, ids) for ids in blocks]
    columns = next(iter(family_of(layer).shapes(layer).values()))[1]
    increases = [_increase(before, after, ids) for before, after, ids in zip(untouched, now, blocks, strict=True)]
    loss, divergence = (sum(values) / len(values) for values in zip(*increases, strict=True))
    return SchemeTrial(str(scheme), scheme.weights.bits_per_value(columns), loss, divergence)


def _predictions(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1)


def _increase(before: Tensor, after: Tensor, ids: Tensor) -> tuple[float, float]:
    labels = ids[0, 1:].to(after.device)
    loss = F.nll_loss(after, labels) - F.nll_loss(before, labels)
    return loss.item(), F.kl_div(after, before, reduction="batchmean", log_target=True).item()
