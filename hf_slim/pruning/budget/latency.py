"""Measures the time of the parts of a model with fewer groups, on the model's device."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.host import field_of, text_config_of
from hf_slim.core.modules import plain_copy
from hf_slim.core.running.distributed import made_by_first_rank
from hf_slim.pruning.budget.plan import step_ends
from hf_slim.pruning.budget.selection import least_first
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet, common_ancestor
from hf_slim.pruning.removal.cut import cut_out_
from hf_slim.pruning.structure.example_inputs import example_inputs
from hf_slim.pruning.structure.probe import run_cut, weightless_twin
from hf_slim.timing import interleaved_ms

TOKENS = 256  # length of the text, as of a prompt
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # shares of the removable groups that are kept while time is measured
REPEATS = 7
WHOLE = -1  # used instead of a number of groups, for a whole layer
LENGTH_LIMITS = ("max_position_embeddings", "n_positions", "max_target_positions")
Given = tuple[tuple, dict[str, Any]]  # arguments of a forward pass, by position and by name


def measure_latency(model: nn.Module, group_sets: list[GroupSet], config: PruningConfig) -> dict[str, Any]:
    """The times of blocks and layers, as JSON; blocks and layers with the same shapes are measured once.

    In a run with several processes, the first one measures for all. A model without weights is measured on the CPU.

    Args:
        group_sets: The group sets that a target may be spent on.
    Returns: `total_ms` of the stacked layers, `curves` with `ms` for each number of `kept` groups of the named sets,
        and the conditions: `device`, `dtype`, and the shapes of `inputs`.
    Raises: SlimError: if a part of the model cannot be run separately.
    """

    def measure() -> dict[str, Any]:
        with torch.random.fork_rng(), torch.no_grad():
            return _measured(model, group_sets, config)

    return made_by_first_rank(measure)


def _measured(model: nn.Module, group_sets: list[GroupSet], config: PruningConfig) -> dict[str, Any]:
    layers: dict[Any, list[str]] = {}
    for path in _layer_paths(model):
        layers.setdefault(_shapes(model.get_submodule(path)), []).append(path)
    blocks: dict[Any, list[GroupSet]] = {}
    for group_set in group_sets:
        if not group_set.stack and len(step_ends(group_set, config)):
            path = _block_of(model, group_set)
            inner = _within(group_set, path)
            key = (_shapes(model.get_submodule(path)), inner.slices, inner.balance)
            blocks.setdefault(key, []).append(group_set)
    jobs = {(paths[0], WHOLE): (paths[0], _copy_of(model, paths[0])) for paths in layers.values()}
    for sets in blocks.values():
        path = _block_of(model, sets[0])
        jobs |= {(sets[0].name, kept): (path, block) for kept, block in _cut(model, path, sets[0], config)}
    inputs = _long(example_inputs(model), model)
    times = _times(jobs, _given_to(model, list(dict.fromkeys(path for path, _ in jobs.values())), inputs))
    layer_ms = {path: times[paths[0], WHOLE] for paths in layers.values() for path in paths}
    curves = [_curve(model, sets, times) for sets in blocks.values()]
    curves += [_stack_curve(group_set, layer_ms) for group_set in group_sets if group_set.stack]
    like = next(model.parameters())
    shapes = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
    return {
        "total_ms": sum(layer_ms.values()), "curves": curves, "inputs": shapes,
        "device": "cpu" if like.is_meta else str(like.device), "dtype": str(like.dtype).removeprefix("torch."),
    }  # fmt: skip


def _cut(model: nn.Module, path: str, group_set: GroupSet, config: PruningConfig) -> Iterator[tuple[int, nn.Module]]:
    """Copies of the block with the set, with fewer and fewer groups: (number of groups, copy)."""
    ends = [0, *step_ends(group_set, config).tolist()]
    order = least_first(group_set, torch.zeros(group_set.count), []).tolist()
    inner = _within(group_set, path)
    for n_removed in sorted({min(ends, key=lambda end: abs(end - (1 - share) * ends[-1])) for share in SHARES}):
        block = _copy_of(model, path)
        cut_out_(block, [inner], {inner.name: sorted(order[:n_removed])})
        yield group_set.count - n_removed, block


def _curve(model: nn.Module, alike: list[GroupSet], times: dict[tuple[str, int], float]) -> dict[str, Any]:
    found = {kept: ms for (name, kept), ms in times.items() if name == alike[0].name}
    names = [group_set.name for group_set in alike]
    block = _block_of(model, alike[0])
    return {"group_sets": names, "block": block, "kept": list(found), "ms": list(found.values())}


def _stack_curve(group_set: GroupSet, layer_ms: dict[str, float]) -> dict[str, Any]:
    """The curve of whole layers: removing any of them saves the mean time of a layer."""
    total = sum(ms for path, ms in layer_ms.items() if path.startswith(f"{group_set.stack}."))
    kept = [group_set.count, 0]
    return {"group_sets": [group_set.name], "block": group_set.stack, "kept": kept, "ms": [total, 0.0]}


def _times(
    jobs: dict[tuple[str, int], tuple[str, nn.Module]], given: dict[str, Given]
) -> dict[tuple[str, int], float]:
    """Median milliseconds of every copy, measured in turn, so that other load on the machine affects all equally."""

    def runner(path: str, block: nn.Module) -> Callable[[], object]:
        arguments, named = given[path]

        def run() -> None:
            try:
                block(*arguments, **named)
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
                reason = str(error).splitlines()[0]
                raise SlimError(f"'{path}' could not be timed separately ({reason}). Use a target of macs.") from error

        return run

    samples = interleaved_ms({name: runner(*job) for name, job in jobs.items()}, REPEATS)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _layer_paths(model: nn.Module) -> list[str]:
    """The members of all outermost stacks; of a model without stacks, the model."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(f"{name}.".startswith(f"{path}.") for path in found):
            found += [f"{name}.{index}" for index in range(len(module))]
    return found or [""]


def _block_of(model: nn.Module, group_set: GroupSet) -> str:
    """Path of the smallest module that contains a group set and can be called."""
    path = common_ancestor([part.tensor for part in group_set.slices])
    while isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return path


def _within(group_set: GroupSet, block: str) -> GroupSet:
    """The group set with paths relative to the block."""
    head = f"{block}." if block else ""
    slices = tuple(replace(part, tensor=part.tensor.removeprefix(head)) for part in group_set.slices)
    inside = [(path, name) for path, name in group_set.attributes if f"{path}.".startswith(head)]
    attributes = tuple((f"{path}.".removeprefix(head).rstrip("."), name) for path, name in inside)
    return replace(group_set, name=group_set.kind, slices=slices, attributes=attributes)


def _shapes(module: nn.Module) -> tuple:
    return type(module), tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())


def _copy_of(model: nn.Module, path: str) -> nn.Module:
    """A copy of a block without hooks, with random weights if the model has none."""
    block = plain_copy(model.get_submodule(path)).eval().requires_grad_(False)
    for module in block.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    if any(tensor.is_meta for tensor in block.parameters()):
        block = block.to_empty(device="cpu")
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0, 0.05)
    return block


def _given_to(model: nn.Module, paths: list[str], inputs: dict[str, Tensor]) -> dict[str, Given]:
    """Random arguments with the shapes with which the modules at `paths` are called in a forward pass."""
    found: dict[str, Given] = {}
    twin, like = weightless_twin(model), next(model.parameters())

    def noting(path: str) -> Callable[[nn.Module, tuple, dict], None]:
        def note(module: nn.Module, arguments: tuple, named: dict) -> None:
            found.setdefault(path, (_random_like(arguments, like), _random_like(named, like)))

        return note

    for path in paths:
        twin.get_submodule(path).register_forward_pre_hook(noting(path), with_kwargs=True)
    run_cut(twin, inputs)
    missing = [path for path in paths if path not in found]
    if missing:
        raise SlimError(f"'{missing[0]}' is never called, so it cannot be timed. Use a target of macs.")
    return found


def _random_like(value: Any, like: Tensor) -> Any:
    if isinstance(value, dict):
        return {name: _random_like(part, like) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_random_like(part, like) for part in value)
    if not isinstance(value, Tensor):
        return value
    device = "cpu" if like.is_meta else like.device
    # new numbers, because the outputs of cut layers are so similar that all tokens would be routed to one expert
    if value.is_floating_point():
        return torch.randn(value.shape, dtype=like.dtype, device=device)
    return value.detach().to(device)


def _long(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The example with longer texts: `TOKENS` tokens, or the maximum length of the model."""
    text = text_config_of(model)
    limits = [field_of(text, name) for name in LENGTH_LIMITS]
    tokens = min([TOKENS, *(limit - 2 for limit in limits if limit)])  # RoBERTa uses two positions for padding
    texts = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dtype == torch.long}
    return inputs | {name: value.repeat(1, tokens)[:, :tokens] for name, value in texts.items()}
