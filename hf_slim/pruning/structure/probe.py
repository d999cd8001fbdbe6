"""Finds dependencies: the output channels of layers from which each input channel of a layer is computed.

In a probe every layer with a matrix is cut: it returns random numbers instead of computing. The remaining arithmetic
connects the layers (activations, attention, reshapes, sums). Its gradient shows which channels belong together, for
any model family. No weight is read or copied.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_slim.pruning.matrices import Matrix, is_channelwise, is_experts, is_norm, matrix_of, random_output

# errors of a forward pass in which sizes do not match
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, NameError)


@dataclass(eq=False)
class Output:
    """The output of a cut layer.

    Attributes:
        layer: Path of the layer.
        value: A leaf of the graph, with channels in dimension `dim`, counted from the end.
        is_stream: Whether a later layer mixes all its channels, as in the residual stream of a model.
    """

    layer: str
    value: Tensor
    dim: int
    is_stream: bool = False

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.value.shape[self.dim]


@dataclass(eq=False)
class Reading:
    """The input of a layer: `value`, computed from earlier outputs, with channels in dimension `dim` from the end."""

    layer: str
    value: Tensor
    dim: int

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.value.shape[self.dim]


Dependence = dict[Output, frozenset[int]]  # output -> its channels on which something depends


@dataclass
class Probe:
    """One forward pass of a cut model.

    Attributes:
        inputs: Inputs of the model.
        outputs: Outputs of cut layers, in the order of the forward pass.
        readings: Inputs of cut layers, in the order of the forward pass.
        norms: Inputs of modules with a weight for every channel that mix all channels.
        result: Output of the model.
        fixed_outputs: Outputs that each layer returns, one per call; empty: random numbers.
    """

    inputs: dict[str, Tensor]
    outputs: list[Output] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    norms: list[Reading] = field(default_factory=list)
    result: Tensor | None = None
    fixed_outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def reaching_result(self) -> list[Output]:
        """The outputs on which the result depends by arithmetic only, without a layer in between."""
        if self.result is None or not self.result.requires_grad:
            return []
        leaves = [output.value for output in self.outputs]
        found = torch.autograd.grad(self.result.sum(), leaves, retain_graph=True, allow_unused=True)
        return [output for output, gradient in zip(self.outputs, found, strict=True) if gradient is not None]

    def depends_on(self, reading: Reading, start: int, length: int = 1) -> Dependence:
        """The channels of outputs, except those of the stream, that channels of a reading depend on."""
        candidates = [output for output in self.outputs if not output.is_stream]
        if not candidates or not reading.value.requires_grad:
            return {}
        chosen = reading.value.narrow(reading.dim, start, length)
        upstream = torch.rand_like(chosen) + 0.5  # random, so that contributions do not cancel
        leaves = [output.value for output in candidates]
        found = torch.autograd.grad(chosen, leaves, upstream, retain_graph=True, allow_unused=True)
        touched = {
            output: frozenset(_nonzero_channels(gradient, output.dim))
            for output, gradient in zip(candidates, found, strict=True)
            if gradient is not None
        }
        return {output: channels for output, channels in touched.items() if channels}


def run_cut(twin: nn.Module, inputs: dict[str, Tensor], fixed_outputs: dict[str, list[Tensor]] | None = None) -> Probe:
    """One forward pass of a copy without weights, with every matrix cut."""
    probe = Probe(inputs, fixed_outputs={name: list(values) for name, values in (fixed_outputs or {}).items()})
    with torch.enable_grad(), _cut(twin, probe):
        made = twin(**inputs)
    probe.result = (
        made if isinstance(made, Tensor) else next(iter(made.values() if isinstance(made, Mapping) else made))
    )
    return probe


def weightless_twin(model: nn.Module) -> nn.Module:
    """A copy of the modules in evaluation mode on the CPU, with matrices on the meta device, so it needs no memory."""
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        is_cut = matrix_of(module) is not None or is_experts(module)
        for parameter in module.parameters(recurse=False):
            # the weights of norms differ between channels, so that a norm after another one has an effect
            replacement = (
                torch.empty_like(parameter, device="meta")
                if is_cut
                else random_output(parameter.shape, parameter.dtype)
            )
            memo.setdefault(id(parameter), nn.Parameter(replacement, requires_grad=False))
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = torch.ones_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().cpu()
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():  # hooks that observe or mask the model must not run for the copy
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def module_copy(twin: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor; its tensors can be replaced without changing `twin`."""
    memo = {id(tensor): tensor for tensor in (*twin.parameters(), *twin.buffers())}
    return copy.deepcopy(twin, memo)


@contextmanager
def _cut(twin: nn.Module, probe: Probe) -> Iterator[None]:
    changed = []
    for name, module in twin.named_modules():
        matrix = matrix_of(module)
        if matrix is not None:
            module.forward = _cut_forward(name, module, matrix, probe)
        elif is_experts(module):
            module.forward = _cut_forward_like_input(name, probe)
        elif is_channelwise(module):
            module.forward = _recording_forward(name, module, probe.readings, 1)
        elif is_norm(module):
            module.forward = _recording_forward(name, module, probe.norms, -1)
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _cut_forward(name: str, module: nn.Module, matrix: Matrix, probe: Probe) -> Callable[..., Tensor]:
    def forward(value: Tensor, *args: object, **kwargs: object) -> Tensor:
        if matrix.in_dim is not None:
            reading = Reading(name, value, matrix.channels)
            if reading.channels != module.weight.shape[matrix.in_dim]:
                expected = module.weight.shape[matrix.in_dim]
                raise ValueError(f"'{name}' has {expected} inputs and was given {reading.channels}")
            probe.readings.append(reading)
        dtype = value.dtype if value.is_floating_point() else module.weight.dtype
        return _new_output(name, matrix.output_shape(module, value), dtype, matrix.channels, probe)

    return forward


def _cut_forward_like_input(name: str, probe: Probe) -> Callable[..., Tensor]:
    def forward(value: Tensor, *args: object, **kwargs: object) -> Tensor:
        return _new_output(name, tuple(value.shape), value.dtype, -1, probe)

    return forward


def _recording_forward(name: str, module: nn.Module, readings: list[Reading], dim: int) -> Callable[..., Tensor]:
    def forward(value: Tensor, *args: object, **kwargs: object) -> Tensor:
        readings.append(Reading(name, value, dim if dim < 0 else dim - value.dim()))
        return type(module).forward(module, value, *args, **kwargs)

    return forward


def _new_output(name: str, shape: tuple[int, ...], dtype: torch.dtype, dim: int, probe: Probe) -> Tensor:
    given = probe.fixed_outputs.get(name)
    value = (given.pop(0) if given else random_output(shape, dtype)).requires_grad_(True)
    probe.outputs.append(Output(name, value, dim))
    return value.clone()  # models change outputs in place, which is not allowed for a leaf


def _nonzero_channels(gradient: Tensor, dim: int) -> list[int]:
    return gradient.movedim(dim, 0).flatten(1).count_nonzero(1).nonzero().squeeze(1).tolist()
