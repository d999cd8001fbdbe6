"""prepare and convert: the two operations of every technique, in the order that works.

`prepare` puts a model into its training-time form, `convert` produces the final form. All techniques are listed in one
table, `integration/techniques.py`. It is imported by name when it is first needed, because `core` must not depend on
techniques, and the callback that ends a run also converts for other techniques.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.core.modules import sizes_of
from hf_slim.core.record import record_of, unwrapped

TABLE = "hf_slim.integration.techniques"  # defines LIFECYCLE


@dataclass(frozen=True)
class Technique:
    """How one technique prepares and converts a model. Lower `order` runs first: prune, then quantize.

    Attributes:
        check: Raises SlimError if `prepare` cannot work, and does not change the model. Its result is the third
            argument of `prepare`, so that nothing is planned twice.
        convert: Produces the final form; also receives the optimizer that continues with the converted model, if any.
        trains_on: Whether a converted model can be trained further.
        state_class: Class of its run state, which is deleted when a model is converted; see `core.record.state_of`.
    """

    name: str
    order: int
    config_class: type[SlimConfig]
    check: Callable[[nn.Module, Any], Any]
    prepare: Callable[[nn.Module, Any, Any], None]
    convert: Callable[[nn.Module, Optimizer | None], None]
    trains_on: bool = False
    state_class: type | None = None


@dataclass(frozen=True)
class Lifecycle:
    """All techniques that change a model, and the functions that run after each change.

    Attributes:
        techniques: In any order.
        before_prepare: Raises SlimError where the result of `prepare` could not be saved as asked; changes nothing. It
            receives the configs, each with what its technique's check has found.
        after_prepare: Runs after every `prepare`: writes the model's config.
        after_convert: Runs after every `convert`: writes the model's config.
    """

    techniques: tuple[Technique, ...]
    before_prepare: Callable[[nn.Module, list[tuple[Any, Any]]], None]
    after_prepare: Callable[[nn.Module], None]
    after_convert: Callable[[nn.Module], None]

    def technique_for(self, config: SlimConfig) -> Technique:
        """The technique that a config belongs to. Raises SlimError if there is none."""
        for technique in self.techniques:
            if type(config) is technique.config_class:
                return technique
        allowed = ", ".join(technique.config_class.__name__ for technique in self.techniques)
        raise SlimError(
            f"`prepare` cannot use {type(config).__name__}. Allowed: {allowed}; another config needs its callback."
        )


def claim(model: nn.Module, technique: str, config: SlimConfig) -> bool:
    """Records that `technique` works on this model. Returns False if an equal config was recorded before.

    Raises: SlimError: if the model is already prepared with another config of the same technique.
    """
    record = record_of(model)
    configs = record.configs
    if technique not in configs:
        record.base_sizes = record.base_sizes or sizes_of(model)
        configs[technique] = config
        return True
    if configs[technique] != config:
        raise SlimError(
            f"This model is already prepared for {technique} with {configs[technique]}, so it cannot be prepared with "
            f"{config}. Use one config per technique, or load the model again."
        )
    return False


def prepare(model: nn.Module, *configs: SlimConfig) -> nn.Module:
    """Puts `model` into training-time form, in place, for each config: prune first, then quantize.

    Preparing again with an equal config changes nothing.

    Args:
        model: Any `nn.Module`; parameter names do not change.
        configs: At most one config per technique, in any order.
    Returns: the same model.
    Raises: SlimError: for two configs of one technique, no matching layer, or a config that needs a callback.
    """
    lifecycle = _lifecycle()
    chosen = [lifecycle.technique_for(config) for config in configs]
    for technique in chosen:
        if chosen.count(technique) > 1:
            raise SlimError(f"`prepare` got two configs for {technique.name}. Pass one config per technique.")
    ordered = sorted(zip(chosen, configs, strict=True), key=lambda pair: pair[0].order)
    inner = unwrapped(model)
    checked = [technique.check(inner, config) for technique, config in ordered]
    lifecycle.before_prepare(inner, [(config, found) for (_, config), found in zip(ordered, checked, strict=True)])
    for (technique, config), found in zip(ordered, checked, strict=True):
        technique.prepare(inner, config, found)
    lifecycle.after_prepare(inner)
    return model


def convert(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Turns a prepared model into its final form, in place: masked groups are removed, weights are packed.

    The converted model gives the logits of the prepared one, up to float rounding.

    Args:
        optimizer: Continues with the pruned model: it gets the smaller parameters, and its state becomes smaller too.
    Returns: the same model, ready for `save_pretrained`; for a model in an adapter wrapper, the merged model inside.
    Raises: SlimError: if nothing is prepared.
    """
    model, lifecycle = unwrapped(model), _lifecycle()
    record = record_of(model)
    if not record.configs:
        raise SlimError(
            "Nothing to convert: this model is not prepared. Call `prepare(model, config)` or train it with a "
            "callback first; a model that was trained with a callback is converted already when training ends."
        )
    prepared = [technique for technique in lifecycle.techniques if technique.name in record.configs]
    for technique in sorted(prepared, key=lambda technique: technique.order):
        technique.convert(model, optimizer)
        record.applied[technique.name] = record.configs.pop(technique.name).to_dict()
    lifecycle.after_convert(model)
    for technique in prepared:
        if technique.state_class is not None:
            record.states.pop(technique.state_class, None)
    record.run, record.running = None, set()
    return model


def begin_run(model: nn.Module, technique: str, run: object) -> None:
    """Records that a technique's callback takes part in a training run, so that the run is not finished without it.

    Args:
        run: Any object that all callbacks of the run share, such as the Trainer's state; another run replaces it.
    """
    record = record_of(model)
    if record.run is not run:
        record.run, record.running = run, set()
    record.running.add(technique)


def finish_run(model: nn.Module, technique: str, optimizer: Optimizer | None = None) -> None:
    """Records that a technique has finished its run. When all techniques of the run have, the model is converted.

    Args:
        optimizer: The optimizer of the run; it continues with a model that was only pruned.
    """
    record = record_of(model)
    record.running.discard(technique)
    if record.configs and not record.running:
        prepared = [t for t in _lifecycle().techniques if t.name in record.configs]
        convert(model, optimizer if all(t.trains_on for t in prepared) else None)


def _lifecycle() -> Lifecycle:
    return importlib.import_module(TABLE).LIFECYCLE
