"""Previews of the effect of each technique on a model, for dry runs and reports. The model is not changed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_slim.distillation.config import DistillationConfig
from hf_slim.distillation.store.reader import is_stored_teacher
from hf_slim.distillation.teachers.live import check_teacher
from hf_slim.distillation.teachers.stored import DiskTeacher
from hf_slim.integration.loading import load_skeleton
from hf_slim.pruning.budget.plan import expected_losses
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.removal.cut import cut_out_
from hf_slim.pruning.transform import plan_pruning
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.plan import plan_quantization


@dataclass(frozen=True)
class Preview:
    """The effect that a technique would have on a model.

    Attributes:
        layers: Layer name -> what happens to it, in a few words.
        bits: Layer name -> bits that one weight of it takes on disk, scales included; other layers are kept in float.
        removed: `(parameters, layer)` per removed part: how many on average, and a layer that loses them.
        lines: Further information, as lines of text.
        shrink_: Cuts the model, which may be on the meta device, as the technique would: the next stage starts there.
    """

    layers: dict[str, str] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    removed: tuple[tuple[float, str], ...] = ()
    lines: tuple[str, ...] = ()
    shrink_: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Inputs:
    """Further inputs of a preview: the run's tokenizer, and the class that loads its models."""

    tokenizer: PreTrainedTokenizerBase
    auto_class: type


def preview_distillation(model: nn.Module, config: DistillationConfig, inputs: Inputs) -> Preview:
    """An empty preview, because distillation does not change the model. Raises SlimError if a teacher does not fit."""
    for name in config.teachers:
        if is_stored_teacher(name):
            DiskTeacher(name, model, inputs.tokenizer, config)
        elif name != "self":
            compares_classes = bool(set(config.divergences) - {"universal"})
            check_teacher(model, load_skeleton(name, inputs.auto_class), compares_classes)
    return Preview()


def preview_pruning(model: nn.Module, config: PruningConfig, inputs: Inputs) -> Preview:
    """The number of groups removed from every layer; a mean if layers may differ."""
    plan = plan_pruning(model, config)
    losses, removed = expected_losses(plan), []
    layers: dict[str, str] = {}
    for group_set in plan.group_sets:
        groups, names = losses[group_set.name], dict.fromkeys(part.module for part in group_set.slices)
        removed.append((groups * group_set.parameters_per_group(model), next(iter(names))))
        for name in names:
            layers[name] = ", ".join(filter(None, [layers.get(name), f"loses {groups:g} groups"]))
    lines = _timing_lines(plan.timings) if plan.timings else []
    if not all(config.uniform_by_kind.values()):
        lines.append("groups      averages, where layers may differ: training decides which are removed")
    first_groups = {name: list(range(round(groups))) for name, groups in losses.items()}
    return Preview(
        layers, removed=tuple(removed), lines=tuple(lines),
        shrink_=lambda: cut_out_(model, plan.group_sets, first_groups),
    )  # fmt: skip


def preview_quantization(model: nn.Module, config: QuantizationConfig, inputs: Inputs) -> Preview:
    """The grid of every layer, or the reason why it remains in floating point."""
    plans = plan_quantization(model, config)
    bits = {}
    for plan in plans:
        if plan.scheme:
            parameters = model.get_submodule(plan.name).parameters(recurse=False)
            matrix = next(parameter for parameter in parameters if parameter.dim() > 1)
            bits[plan.name] = plan.scheme.weights.bits_per_value(matrix[0].numel())
    return Preview({plan.name: str(plan.scheme or f"float ({plan.reason})") for plan in plans}, bits)


def layer_schemes(model: nn.Module, config: QuantizationConfig) -> list[dict[str, Any]]:
    """Each layer for the report: name, scheme or None, and the reason why it remains in floating point."""
    plans = plan_quantization(model, config)
    return [{"name": p.name, "scheme": str(p.scheme) if p.scheme else None, "reason": p.reason} for p in plans]


def _timing_lines(timings: dict[str, Any]) -> list[str]:
    """The measured times for a latency target, as lines of text."""
    read = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in timings["inputs"].items())
    lines = [f"measured    on {timings['device']} in {timings['dtype']}, {read}: layers {timings['total_ms']:.1f} ms"]
    for curve in timings["curves"]:
        steps = ", ".join(f"{kept}: {ms:.2f}" for kept, ms in zip(curve["kept"], curve["ms"], strict=True))
        same = f" (and {len(curve['group_sets']) - 1} like it)" if len(curve["group_sets"]) > 1 else ""
        lines.append(f"            {curve['group_sets'][0]}{same}, ms by what is kept: {steps}")
    return lines
