"""Replaces ordinary layers by fake-quantized ones, and those by packed ones."""

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_slim.core.contracts import PackedLayer, PreparedLayer
from hf_slim.core.errors import SlimError
from hf_slim.core.host import parameter_or_none
from hf_slim.core.lifecycle import Technique, claim
from hf_slim.core.modules import require_finite, set_module_, tied_modules
from hf_slim.core.record import is_prepared
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.layers.families import family_of, packed_form
from hf_slim.quantization.layers.merged_adapters import merge_adapters_, simulate_merged_
from hf_slim.quantization.layers.training import Training
from hf_slim.quantization.plan import plan_quantization
from hf_slim.quantization.scheme import Scheme


def check_quantization(model: nn.Module, config: QuantizationConfig) -> dict[str, Scheme]:
    """The layers that `config` quantizes, with their schemes; none if the model is prepared already.

    Raises: SlimError: if the model is packed, holds NaN, or `plan_quantization` rejects the config.
    """
    if any(is_packed(module) for module in model.modules()):
        raise SlimError(
            "This model is packed already: its integer weights cannot be trained. Load the float model it came from, "
            "or a training checkpoint."
        )
    if is_prepared(model, "quantization"):
        return {}
    schemes = planned_schemes(model, config)
    for name in schemes:
        layer = model.get_submodule(name)
        for weight in family_of(layer).shapes(layer):
            floats = family_of(layer).floats(layer, weight)
            _require_floats(f"{name}.{weight}", floats)
            require_finite(name, floats)
    return schemes


def prepare_quantization(model: nn.Module, config: QuantizationConfig, schemes: dict[str, Scheme]) -> None:
    """Replaces every planned layer by its fake-quantized form, in place. Parameters and their names do not change.

    Args:
        schemes: The result of `check_quantization`.
    """
    if claim(model, "quantization", config):
        fake_quantize_layers_(model, schemes, config)
        simulate_merged_(model)
        observe_weights_(model, config.observer)


def fake_quantize_layers_(
    model: nn.Module, schemes: dict[str, Scheme], config: QuantizationConfig, ties: dict[str, str] | None = None
) -> None:
    """Replaces the named layers by fake-quantized ones that share their parameters; scales are not initialised yet.

    Args:
        ties: Modules whose weight is that of another one, later name -> first name; None: as their weights are now.
    """
    training = Training(config.learn, config.learn_activations, config.calibration_batches, config.stores_scales)
    tied = tied_modules(model) if ties is None else ties
    shared = set(tied) | set(tied.values())
    for name, scheme in schemes.items():
        layer = model.get_submodule(name)
        # a shared weight has no stored scales: the embedding and its tied head must round it in the same way
        own = Training(None, training.learn_activations, training.calibration_batches) if name in shared else training
        set_module_(model, name, family_of(layer).fake_quantized(layer, scheme, own))


def observe_weights_(model: nn.Module, observer: str) -> None:
    """Initialises the scales that quantizers store."""
    for layer in fake_quantized_modules(model).values():
        for name, matrix in layer.matrices().items():
            layer.get_submodule(f"{name}_quantizer").observe_(matrix, observer)


def pack_layers_(model: nn.Module) -> None:
    """Replaces every fake-quantized layer by its packed form; tied layers share one set of codes and scales."""
    merge_adapters_(model)
    tied = tied_modules(model)
    for name, layer in fake_quantized_modules(model).items():
        for matrix in layer.matrices().values():
            require_finite(name, matrix)
        try:
            packed = packed_form(layer)
        except SlimError as error:
            raise type(error)(f"'{name}': {error}") from error
        if name in tied:
            owner = model.get_submodule(tied[name])
            packed.weight = owner.weight
            for buffer in ("weight_scale", "weight_zero_point"):
                if parameter_or_none(packed, buffer) is not None:
                    setattr(packed, buffer, owner.get_buffer(buffer))
        set_module_(model, name, packed)


def empty_packed_layers_(model: nn.Module, schemes: dict[str, Scheme]) -> None:
    """Replaces the named layers by packed ones without values, to be filled from a checkpoint."""
    for name, scheme in schemes.items():
        layer = model.get_submodule(name)
        set_module_(model, name, family_of(layer).empty_packed(layer, scheme))


def is_packed(module: nn.Module) -> bool:
    """Whether the module stores codes instead of its weights."""
    return isinstance(module, PackedLayer)


def fake_quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers in training-time form, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PreparedLayer)}


def quantized_layers(model: nn.Module) -> dict[str, Scheme]:
    """The layers that are fake-quantized or packed, with their schemes."""
    return {n: m.scheme for n, m in model.named_modules() if isinstance(m, PreparedLayer | PackedLayer)}


def average_bits(model: nn.Module) -> float | None:
    """Bits per weight of the fake-quantized layers after packing, scales included; None without such layers."""
    bits = weights = 0.0
    for layer in fake_quantized_modules(model).values():
        for name, columns in layer.columns.items():
            is_linear = isinstance(layer, nn.Linear)  # bitsandbytes may store several weights in one element
            count = layer.out_features * columns if is_linear else layer.get_parameter(name).numel()
            bits += count * layer.scheme.weights.bits_per_value(columns)
            weights += count
    return bits / weights if weights else None


def share_on_grid(model: nn.Module) -> float:
    """Share of the fake-quantized layers that currently round their weights in the forward pass, in [0, 1]."""
    layers = fake_quantized_modules(model).values()
    enabled = [layer.get_submodule(f"{next(iter(layer.columns))}_quantizer").enabled for layer in layers]
    return sum(enabled) / max(1, len(enabled))


def planned_schemes(model: nn.Module, config: QuantizationConfig) -> dict[str, Scheme]:
    """The layers that `config` quantizes, with their schemes."""
    return {plan.name: plan.scheme for plan in plan_quantization(model, config) if plan.scheme}


def _require_floats(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise SlimError(
            f"'{name}' has dtype {weight.dtype}, and only floating-point weights can be quantized. Load the model in "
            "float32 or bfloat16, without another quantizer."
        )


def convert_quantization(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Packs all fake-quantized layers. Raises SlimError if an optimizer is given: codes cannot be trained."""
    if optimizer is not None:
        raise SlimError(
            "`convert` was called with an optimizer, and packed weights cannot be trained further. Call "
            "`convert(model)` without it."
        )
    pack_layers_(model)


QUANTIZATION = Technique(
    "quantization", 20, QuantizationConfig, check_quantization, prepare_quantization, convert_quantization
)
