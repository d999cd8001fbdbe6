"""The input of a packed layer on its grid, in operators that a tracer can follow for any number of tokens."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from hf_slim.core.host import parameter_or_none
from hf_slim.quantization.grids.grid import Grid, GridState, observed_state, snapped


def rounded(input: Tensor, grid: Grid, dims: tuple[int, ...], static: GridState | None) -> Tensor:
    """The input of a layer rounded as `kernels.cpu.quantized_input` does, bit for bit, without chunks and gradients.

    Args:
        dims: Dimensions of the input that share a scale, where each token has one.
        static: What `static_state` says of the layer.
    """
    state = observed_state(input, grid, dims) if static is None else static
    return snapped(input.float(), grid, state).to(input.dtype)


def static_state(layer: nn.Module, grid: Grid) -> GridState | None:
    """The one scale, and zero point if any, of a layer's input; None where tokens have their own ones."""
    if grid.granularity == "token" or grid.scale is not None:
        return None
    zero_point = parameter_or_none(layer, "input_zero_point")
    return GridState(layer.input_scale.view(1), None if zero_point is None else zero_point.view(1))


def round_inputs_(layer: nn.Module, grid: Grid) -> None:
    """Lets a layer round its first input in a hook instead of its own forward."""
    layer.scheme = dataclasses.replace(layer.scheme, activations=None)

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(inputs[0], grid, module.dims, static_state(module, grid)), *inputs[1:])

    layer._forward_pre_hooks = layer._forward_pre_hooks.copy()  # those of the model that it is a copy of stay
    layer.register_forward_pre_hook(hook)
