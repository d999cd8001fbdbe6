"""The structure of a model as text: every layer with shape, grid and bytes, and the groups that can be pruned."""

import logging
from typing import Any

import torch
from torch import nn

from hf_slim.core.contracts import PackedLayer
from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_value, field_of
from hf_slim.core.modules import tied_modules
from hf_slim.evaluation.footprint import counting_unit, multiply_adds_per_token, parameter_count, ram_bytes
from hf_slim.integration.loading import class_of, load_model
from hf_slim.pruning.structure.find import understand
from hf_slim.quantization.layers.families import family_of
from hf_slim.quantization.transform import is_packed, quantized_layers

logger = logging.getLogger(__name__)


def inspect(spec: str, dtype: torch.dtype = torch.float32) -> str:
    """The structure of a saved model as text: `hf-slim inspect`.

    Args:
        spec: A Hub id, a folder, or `package:<module>/<file>`.
        dtype: Dtype that the model would run in; the kernel of a layer depends on it.
    Raises: SlimLoadError: if `spec` is not a model that can be loaded.
    """
    logger.info("Loading the model '%s'.", spec)
    model = load_model(spec, dtype, class_of(spec))
    logger.info("Finding the layers and the groups that can be pruned.")
    return describe_model(model)


def describe_model(model: nn.Module) -> str:
    """Layers with their shapes, grids and bytes, and the groups that can be pruned, as text.

    Args:
        model: A transformers model in memory, packed or not.
    """
    saved = config_value(model, "quantization_config")
    schemes, tied = quantized_layers(model), tied_modules(model)
    lines = [
        f"{type(model).__name__}: {_made_by(saved)}",
        f"parameters {parameter_count(model) / 1e6:.1f} M, weights {ram_bytes(model) / 1e6:.1f} MB, "
        + _multiply_adds(model),
        *(f"{name}: {settings}" for name, settings in field_of(saved, "techniques", {}).items()),
        "",
        f"  {'layer':<44} {'shape':>14}  {'grid':<10} {'computes by':<11} {'bytes':>12}",
    ]
    for name, module in model.named_modules():
        if name in schemes or family_of(module) is not None:
            stored = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
            size = "tied" if name in tied else f"{stored:,}"
            grid = str(schemes.get(name, str(model.dtype).removeprefix("torch.")))
            lines.append(f"  {name:<44} {_shape(module):>14}  {grid:<10} {_kernel(module, model):<11} {size:>12}")
    return "\n".join([*lines, "", *_group_lines(model)])


def _made_by(saved: Any) -> str:
    mode = field_of(saved, "mode")
    if not mode:
        return "an ordinary checkpoint"
    text = f"made by hf_slim {saved.version}, {mode}"
    return f"{text}, in format {saved.save_format}" if mode == "packed" else text


def _multiply_adds(model: nn.Module) -> str:
    try:
        return f"{multiply_adds_per_token(model) / 1e6:.1f} M multiply-adds per {counting_unit(model)}"
    except SlimError as error:
        return str(error)


def _group_lines(model: nn.Module) -> list[str]:
    if any(is_packed(module) for module in model.modules()):
        return ["  groups: this model is packed; prune before quantizing"]
    try:
        found, refusals = understand(model)
    except SlimError as error:
        return [f"  groups: {error}"]
    total = parameter_count(model)
    lines = (
        [f"  {'prunable groups':<44} {'groups':>7} {'parameters each':>16} {'share of model':>15}"] if found else []
    )
    for group_set in found:
        size = group_set.parameters_per_group(model)
        share = size * group_set.count / total
        lines.append(f"  {group_set.name:<44} {group_set.count:>7} {size:>16,} {share:>14.1%}")
    return lines + [f"  not prunable: {refusal.reason}" for refusal in refusals] or ["  no prunable groups were found"]


def _shape(module: nn.Module) -> str:
    """The shapes of a layer's weights in floating point, packed or not."""
    if isinstance(module, nn.Embedding):
        shapes = [(module.num_embeddings, module.embedding_dim)]
    elif isinstance(module, nn.Linear):
        shapes = [(module.out_features, module.in_features)]
    else:
        packed = module.columns if isinstance(module, PackedLayer) else None
        names = packed or family_of(module).shapes(module)
        shapes = [module.float_shape(name) if packed else module.get_parameter(name).shape for name in names]
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def _kernel(module: nn.Module, model: nn.Module) -> str:
    """The name of the kernel that a layer uses for one token, in the dtype of the model."""
    if isinstance(module, nn.Embedding):
        return "lookup"
    if not isinstance(module, PackedLayer):
        return "float"
    return module.kernel(torch.empty(1, vars(module).get("in_features", 1), dtype=model.dtype))
