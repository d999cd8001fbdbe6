"""From ordinary layers to fake-quantized ones, and from those to packed ones."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import Technique, claim, is_prepared, register_technique
from hf_slim.core.modules import require_finite, set_module_, tied_modules
from hf_slim.quantization.config import QuantizationConfig, Scheme
from hf_slim.quantization.modules import FakeQuantEmbedding, FakeQuantLinear, PackedEmbedding, PackedLinear

PACKED = (PackedLinear, PackedEmbedding)
FAKE_QUANT = (FakeQuantLinear, FakeQuantEmbedding)


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer: its scheme, or the reason why it stays in floating point."""

    name: str
    scheme: Scheme | None
    reason: str = ""


def plan_quantization(model: nn.Module, config: QuantizationConfig) -> list[LayerPlan]:
    """What `config` does to every layer of `model` that holds a matrix, in model order. Changes nothing.

    Raises: SlimError: if a pattern in `ignore` or the whole config matches no layer, or a group size does not divide.
    """
    tied = tied_modules(model)
    token_embeddings = _token_embeddings(model)
    layers = {name: module for name, module in model.named_modules() if _holds_matrix(module)}
    for pattern in config.ignore:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise SlimError(f"`ignore` pattern '{pattern}' matches no layer. Layers: {_sample(layers)}.")
    plans = []
    for name, module in layers.items():
        ignored = next((pattern for pattern in config.ignore if fnmatchcase(name, pattern)), None)
        in_embedding = isinstance(module, nn.Embedding) or isinstance(layers.get(tied.get(name, "")), nn.Embedding)
        scheme = config.embedding_scheme() if in_embedding else config.linear_scheme()
        reason = ""
        if ignored:
            reason = f"ignored by '{ignored}'"
        elif not isinstance(module, nn.Linear | nn.Embedding):
            reason = f"{type(module).__name__} is not supported yet"
        elif isinstance(module, nn.Embedding) and id(module) not in token_embeddings:
            reason = "not the token embedding"
        elif scheme is None:
            reason = "`embeddings` is not set" + (
                "" if isinstance(module, nn.Embedding) else "; tied to the embedding"
            )
        elif not _is_ordinary(module):
            reason = f"{type(module).__name__} computes in its own way"
        else:
            _check_group_size(name, module, scheme)
        plans.append(LayerPlan(name, None if reason else scheme, reason))
    _check_tied(plans, tied)
    if not any(plan.scheme for plan in plans):
        raise SlimError(f"Nothing to quantize: no layer of {type(model).__name__} matches {config}. Check `ignore`.")
    return plans


def check_quantization(model: nn.Module, config: QuantizationConfig) -> None:
    """Raises SlimError if the model is packed, holds NaN, or `plan_quantization` finds the config impossible."""
    if any(isinstance(module, PACKED) for module in model.modules()):
        raise SlimError(
            "This model is packed already: its integer weights cannot be trained. Load the float model it came from, "
            "or a training checkpoint."
        )
    if not is_prepared(model, "quantization"):
        for name in _planned_schemes(model, config):
            require_finite(name, model.get_submodule(name).weight)


def prepare_quantization(model: nn.Module, config: QuantizationConfig) -> None:
    """Swaps every planned layer for its fake-quantized form, in place. Parameters and their names stay."""
    if claim(model, "quantization", config):
        fake_quantize_layers_(model, _planned_schemes(model, config))


def fake_quantize_layers_(model: nn.Module, schemes: dict[str, Scheme]) -> None:
    """Replaces the named layers by fake-quantized ones that share their parameters."""
    for name, scheme in schemes.items():
        layer = model.get_submodule(name)
        wrapper = FakeQuantEmbedding if isinstance(layer, nn.Embedding) else FakeQuantLinear
        set_module_(model, name, wrapper(layer, scheme))


def pack_layers_(model: nn.Module) -> None:
    """Replaces every fake-quantized layer by its packed form; tied layers share one set of codes and scales."""
    tied = tied_modules(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FAKE_QUANT):
            require_finite(name, module.weight)
            owner = tied.get(name)
            packed = _packed_like(module, model.get_submodule(owner)) if owner else module.packed()
            set_module_(model, name, packed)


def empty_packed_layers_(model: nn.Module, schemes: dict[str, Scheme]) -> None:
    """Replaces the named layers by packed ones without values, before a checkpoint fills them."""
    for name, scheme in schemes.items():
        layer = model.get_submodule(name)
        device = layer.weight.device
        if isinstance(layer, nn.Embedding):
            packed = PackedEmbedding(
                layer.num_embeddings, layer.embedding_dim, layer.padding_idx,
                scheme=scheme, dtype=layer.weight.dtype, device=device,
            )  # fmt: skip
        else:
            packed = PackedLinear(layer.in_features, layer.out_features, layer.bias is not None, scheme, device)
            packed.bias = layer.bias
        set_module_(model, name, packed)


def quantized_layers(model: nn.Module) -> dict[str, Scheme]:
    """The layers that are fake-quantized or packed, with their schemes."""
    return {n: m.scheme for n, m in model.named_modules() if isinstance(m, PACKED + FAKE_QUANT)}


def _planned_schemes(model: nn.Module, config: QuantizationConfig) -> dict[str, Scheme]:
    return {plan.name: plan.scheme for plan in plan_quantization(model, config) if plan.scheme}


def _packed_like(module: FakeQuantLinear, owner: PackedEmbedding | PackedLinear) -> PackedLinear:
    packed = PackedLinear(module.in_features, module.out_features, module.bias is not None, module.scheme, "meta")
    packed.weight, packed.weight_scale = owner.weight, owner.weight_scale
    packed.bias = None if module.bias is None else nn.Parameter(module.bias.detach())
    return packed


def _holds_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() >= 2


def _token_embeddings(model: nn.Module) -> set[int]:
    if hasattr(model, "get_input_embeddings"):
        return {id(model.get_input_embeddings())}
    return {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}


def _is_ordinary(module: nn.Module) -> bool:
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    return type(module).forward is base.forward


def _check_group_size(name: str, module: nn.Module, scheme: Scheme) -> None:
    in_features = module.weight.shape[1]
    if scheme.group_size and in_features % scheme.group_size:
        fitting = [size for size in (16, 32, 64, 128, 256) if in_features % size == 0]
        raise SlimError(
            f"`group_size` {scheme.group_size} does not divide the {in_features} input features of '{name}'. "
            f"Use one of {fitting or [in_features]}, or add the layer to `ignore`."
        )


def _check_tied(plans: list[LayerPlan], tied: dict[str, str]) -> None:
    by_name = {plan.name: plan for plan in plans}
    for name, owner in tied.items():
        if name in by_name and owner in by_name and bool(by_name[name].scheme) != bool(by_name[owner].scheme):
            raise SlimError(
                f"'{name}' and '{owner}' share one weight, but only one of them would be quantized "
                f"({by_name[name].reason or by_name[owner].reason}). Ignore both or neither."
            )


def _sample(names: dict[str, nn.Module], most: int = 4) -> str:
    shown = list(names)[:most]
    return ", ".join(shown) + (", ..." if len(names) > most else "")


register_technique(
    Technique("quantization", 20, QuantizationConfig, check_quantization, prepare_quantization, pack_layers_)
)
