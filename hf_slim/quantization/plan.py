"""The quantization plan of a model: for every layer its scheme, or the reason why it remains in floating point."""

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hf_slim.core.adapters import adapter_parts
from hf_slim.core.errors import SlimConfigError
from hf_slim.core.modules import tied_modules
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.layers.families import LayerFamily, family_of
from hf_slim.quantization.scheme import Scheme


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one layer: its scheme, or the reason why it remains in floating point."""

    name: str
    scheme: Scheme | None
    reason: str = ""


def plan_quantization(model: nn.Module, config: QuantizationConfig) -> list[LayerPlan]:
    """The plan for every layer of `model` that has a weight matrix, in model order. Does not change the model.

    Raises: SlimConfigError: if a pattern or the whole config matches no layer, or a grid does not fit a layer's sizes.
    """
    layers = {name: module for name, module in model.named_modules() if _holds_matrix(module)}
    for setting, patterns in (("ignore", config.ignore), ("overrides", config.overrides)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise SlimConfigError(f"`{setting}` pattern '{pattern}' matches no layer. Layers: {_sample(layers)}.")
    planner = _Planner(model, config, layers)
    plans = [planner.plan(name, module) for name, module in layers.items()]
    _check_tied(plans, planner.tied)
    if not any(plan.scheme for plan in plans):
        raise SlimConfigError(
            f"Nothing to quantize: no layer of {type(model).__name__} matches {config}. Check `ignore`."
        )
    _check_static(plans, config)
    return plans


class _Planner:
    """Plans one layer at a time."""

    def __init__(self, model: nn.Module, config: QuantizationConfig, layers: dict[str, nn.Module]):
        self.config, self.layers = config, layers
        self.tied = tied_modules(model)
        self.adapters = adapter_parts(model)
        self.token_embeddings = _token_embeddings(model)

    def plan(self, name: str, module: nn.Module) -> LayerPlan:
        family = family_of(module)
        scheme, reason = self._scheme_or_reason(name, module, family)
        if scheme is None:
            return LayerPlan(name, None, reason)
        scheme = _trained(family.fitting(scheme), self.config)
        for weight, (rows, columns) in family.shapes(module).items():
            _check_fit(name if weight == "weight" else f"{name}.{weight}", rows, columns, scheme.weights)
        if self._in_embedding(name, module):
            _check_embedding(name, scheme.weights)
        return LayerPlan(name, scheme)

    def _scheme_or_reason(self, name: str, module: nn.Module, family: LayerFamily | None) -> tuple[Scheme | None, str]:
        ignored = next((pattern for pattern in self.config.ignore if fnmatchcase(name, pattern)), None)
        if name in self.adapters:
            return None, "part of an adapter"
        if ignored:
            return None, f"ignored by '{ignored}'"
        if family is None:
            return None, f"{type(module).__name__} is not a supported layer"
        if isinstance(module, nn.Embedding) and id(module.weight) not in self.token_embeddings:
            return None, "not the token embedding"
        if self._in_embedding(name, module):
            scheme = self.config.embedding_scheme()
            if scheme is None:
                owner = "" if isinstance(module, nn.Embedding) else "; tied to the embedding"
                return None, f"`embeddings` is not set{owner}"
            return scheme, ""
        named = [scheme for pattern, scheme in self.config.overrides.items() if fnmatchcase(name, pattern)]
        return (Scheme.of(named[-1]) if named else self.config.linear_scheme()), ""

    def _in_embedding(self, name: str, module: nn.Module) -> bool:
        owner = self.layers.get(self.tied.get(name, ""))
        return isinstance(module, nn.Embedding) or isinstance(owner, nn.Embedding)


def _trained(scheme: Scheme, config: QuantizationConfig) -> Scheme:
    """The scheme, made asymmetric where `lsq+` trains zero points."""
    weights, activations = scheme.weights, scheme.activations
    if config.learn == "lsq+" and weights.kind == "int" and weights.scale is None:
        weights = dataclasses.replace(weights, symmetric=False)
    if config.learn_activations == "lsq+" and _is_static(activations) and activations.kind == "int":
        activations = dataclasses.replace(activations, symmetric=False)
    return Scheme(weights, activations)


def _check_fit(name: str, rows: int, columns: int, grid: Grid) -> None:
    if grid.group_size and columns % grid.group_size:
        fitting = [size for size in range(8, 513) if columns % size == 0]
        raise SlimConfigError(
            f"`group_size` {grid.group_size} does not divide the {columns} input features of '{name}'. "
            f"Use one of {fitting or [columns]}, or add the layer to `ignore`."
        )
    if grid.codebook_channels and rows % grid.codebook_channels:
        raise SlimConfigError(
            f"`codebook_channels` {grid.codebook_channels} does not divide the {rows} output channels of '{name}'."
        )


def _check_embedding(name: str, grid: Grid) -> None:
    if grid.granularity == "tensor" or grid.kind_of.learns_codebook:
        raise SlimConfigError(
            f"'{name}' reads single rows of its weight, so its grid needs granularity channel or group and no learned "
            f"codebook, got kind {grid.kind} and granularity {grid.granularity}. Use w8a16, w4a16-g64 or nf4."
        )


def _check_static(plans: list[LayerPlan], config: QuantizationConfig) -> None:
    static = any(plan.scheme and _is_static(plan.scheme.activations) for plan in plans)
    if config.learn_activations and not static:
        raise SlimConfigError(
            f"`learn_activations: {config.learn_activations}` trains static activation scales, and no layer has them. "
            "Choose a scheme such as 'w8a8-static'."
        )


def _is_static(grid: Grid | None) -> bool:
    return grid is not None and grid.granularity == "tensor" and grid.scale is None


def _holds_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _token_embeddings(model: nn.Module) -> set[int]:
    if hasattr(model, "get_input_embeddings"):
        try:
            return {id(model.get_input_embeddings().weight)}  # several modules may share it, as in T5
        except (NotImplementedError, AttributeError):  # a model without tokens
            return set()
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _check_tied(plans: list[LayerPlan], tied: dict[str, str]) -> None:
    by_name = {plan.name: plan for plan in plans}
    for name, owner in tied.items():
        if name in by_name and owner in by_name and bool(by_name[name].scheme) != bool(by_name[owner].scheme):
            raise SlimConfigError(
                f"'{name}' and '{owner}' share one weight, but only one of them would be quantized "
                f"({by_name[name].reason or by_name[owner].reason}). Ignore both or neither."
            )


def _sample(names: dict[str, nn.Module], most: int = 4) -> str:
    shown = list(names)[:most]
    return ", ".join(shown) + (", ..." if len(names) > most else "")
