"""prepare and convert: the two moves of every technique, in the one order that works.

`prepare` puts a model into its training-time form, `convert` produces the final form. Techniques register here, so
that a callback can finish a run in which other techniques take part without knowing them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.core.modules import RECORD

Step = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Technique:
    """How one technique prepares and converts a model. Lower `order` runs first: prune, then quantize.

    `check` raises SlimError where `prepare` could not work, and changes nothing; what it returns is the third argument
    of `prepare`, so that nothing is looked for twice. `convert` is also given the optimizer that goes on with the
    converted model, if any.
    """

    name: str
    order: int
    config_class: type[SlimConfig]
    check: Callable[[nn.Module, SlimConfig], Any]
    prepare: Callable[[nn.Module, SlimConfig, Any], None]
    convert: Callable[[nn.Module, Optimizer | None], None]


@dataclass
class Record:
    """What hf_slim has done to a model so far; lives on the model, is never saved.

    Attributes:
        configs: Technique name -> config, for what is prepared and not yet converted.
        removed: Group set name -> indices of the groups that are masked and wait for removal.
        plan: What pruning found in the model and is going to remove, found once.
        sizes: Fields of the model's config that would say what was removed, with their new values.
        techniques: Technique name -> config, for everything that was ever applied; goes into config.json.
        before_convert: What a callback still has to settle before the model is converted, by whichever callback.
    """

    configs: dict[str, SlimConfig] = field(default_factory=dict)
    removed: dict[str, list[int]] = field(default_factory=dict)
    plan: Any = None
    sizes: dict[str, int] = field(default_factory=dict)
    techniques: dict[str, dict] = field(default_factory=dict)
    before_convert: list[Callable[[], None]] = field(default_factory=list)


# register themselves when they are imported, which `import hf_slim` leaves to the first `prepare` or `convert`
_REGISTER_HERE = ("hf_slim.pruning.transform", "hf_slim.quantization.transform", "hf_slim.integration.config_json")
_TECHNIQUES: dict[str, Technique] = {}
_AFTER_PREPARE: list[Step] = []
_AFTER_CONVERT: list[Step] = []


def register_technique(technique: Technique) -> None:
    """Makes a technique known to `prepare` and `convert`."""
    _TECHNIQUES[technique.name] = technique


def register_finish(after_prepare: Step, after_convert: Step) -> None:
    """Steps that run after every prepare and every convert: here integration writes the model's config."""
    _AFTER_PREPARE.append(after_prepare)
    _AFTER_CONVERT.append(after_convert)


def record_of(model: nn.Module) -> Record:
    """The model's record, created empty on first use."""
    model = unwrapped(model)
    if RECORD not in model.__dict__:
        model.__dict__[RECORD] = Record()
    return model.__dict__[RECORD]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside an adapter wrapper such as PEFT's, or the model itself: layer names are the model's own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_prepared(model: nn.Module, technique: str | None = None) -> bool:
    """Whether `technique`, or any technique, is prepared and not yet converted."""
    configs = record_of(model).configs
    return technique in configs if technique else bool(configs)


def claim(model: nn.Module, technique: str, config: SlimConfig) -> bool:
    """Notes that `technique` now works on this model; False where the same config has claimed it already.

    Raises:
        SlimError: if the model is already prepared with another config of the same technique.
    """
    configs = record_of(model).configs
    if technique not in configs:
        configs[technique] = config
        return True
    if configs[technique] != config:
        raise SlimError(
            f"This model is already prepared for {technique} with {configs[technique]}, and now {config} arrived. "
            "Use one config per technique, or load the model afresh."
        )
    return False


def prepare(model: nn.Module, *configs: SlimConfig) -> nn.Module:
    """Puts `model` into training-time form, in place, for each config: prune first, then quantize.

    Preparing twice with an equal config changes nothing.

    Args:
        model: Any `nn.Module`; parameter names stay as they are.
        configs: At most one config per technique, in any order.
    Returns: the same model.
    Raises: SlimError: for two configs of one technique, no matching layer, or a config that needs a callback.
    """
    _import_registered()
    chosen = [_technique_for(config) for config in configs]
    for technique in chosen:
        if chosen.count(technique) > 1:
            raise SlimError(f"Two configs for {technique.name} arrived. Pass one config per technique.")
    ordered = sorted(zip(chosen, configs, strict=True), key=lambda pair: pair[0].order)
    inner = unwrapped(model)
    checked = [technique.check(inner, config) for technique, config in ordered]
    for (technique, config), found in zip(ordered, checked, strict=True):
        technique.prepare(inner, config, found)
    for step in _AFTER_PREPARE:
        step(inner)
    return model


def convert(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Turns a prepared model into its final form, in place: removed groups disappear, weights are packed.

    The function does not change: the converted model gives the logits of the prepared one, to float rounding.

    Args:
        optimizer: Is to train the pruned model further: it gets the smaller parameters, and its state is cut alike.
    Returns: the same model, ready for `save_pretrained`; of one in an adapter wrapper, the model inside, merged.
    Raises: SlimError: if nothing is prepared.
    """
    _import_registered()
    model = unwrapped(model)
    record = record_of(model)
    if not record.configs:
        raise SlimError(
            "Nothing to convert: this model is not prepared. Call `prepare(model, config)` or train it with a "
            "callback first; a model that was trained with a callback is converted already when training ends."
        )
    while record.before_convert:
        record.before_convert.pop()()
    for technique in sorted(_TECHNIQUES.values(), key=lambda technique: technique.order):
        if technique.name in record.configs:
            technique.convert(model, optimizer)
            record.techniques[technique.name] = record.configs.pop(technique.name).to_dict()
    for step in _AFTER_CONVERT:
        step(model)
    return model


def _import_registered() -> None:
    for name in _REGISTER_HERE:
        import_module(name)


def _technique_for(config: SlimConfig) -> Technique:
    for technique in _TECHNIQUES.values():
        if type(config) is technique.config_class:
            return technique
    allowed = ", ".join(technique.config_class.__name__ for technique in _TECHNIQUES.values())
    raise SlimError(
        f"`prepare` cannot use {type(config).__name__}. Allowed: {allowed}; anything else needs its callback."
    )
