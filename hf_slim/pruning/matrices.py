"""Layers with a weight matrix: their input and output dimensions, and the attributes with their sizes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_slim.core.host import is_transposed_linear, parameter_or_none


@dataclass(frozen=True)
class Matrix:
    """One kind of layer with a weight matrix.

    Attributes:
        owns: Whether a module is of this kind.
        out_dim: Dimension of `weight` with the outputs.
        in_dim: Dimension of `weight` with the inputs; None: the layer reads no channels.
        out_sizes: Attributes with the number of outputs.
        in_sizes: Attributes with the number of inputs.
        channels: Dimension of the channels in the layer's input and output, counted from the end.
    """

    owns: Callable[[nn.Module], bool]
    out_dim: int
    in_dim: int | None
    out_sizes: tuple[str, ...]
    in_sizes: tuple[str, ...]
    channels: int = -1

    def output_shape(self, module: nn.Module, value: Tensor) -> tuple[int, ...]:
        """The shape of the output of `module` for the input `value`."""
        out = module.weight.shape[self.out_dim]
        if self.in_dim is None:
            return (*value.shape, out)
        if self.channels == -1:
            return (*value.shape[:-1], out)
        return tuple(type(module).forward(module, value.to("meta")).shape)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1


MATRICES = (
    Matrix(lambda module: isinstance(module, nn.Linear), 0, 1, ("out_features",), ("in_features",)),
    Matrix(is_transposed_linear, 1, 0, ("nf",), ("nx",)),  # GPT-2's Conv1D
    Matrix(lambda module: isinstance(module, nn.Embedding), 1, None, ("embedding_dim",), ()),
    Matrix(lambda m: _is_convolution(m) and isinstance(m, nn.Conv1d), 0, 1, ("out_channels",), ("in_channels",), -2),
    Matrix(lambda m: _is_convolution(m) and isinstance(m, nn.Conv2d), 0, 1, ("out_channels",), ("in_channels",), -3),
    Matrix(lambda m: _is_convolution(m) and isinstance(m, nn.Conv3d), 0, 1, ("out_channels",), ("in_channels",), -4),
)


def matrix_of(module: nn.Module) -> Matrix | None:
    """The kind of the matrix of `module`; None if it has no matrix that can be pruned."""
    if not isinstance(parameter_or_none(module, "weight"), Tensor):
        return None
    return next((matrix for matrix in MATRICES if matrix.owns(module)), None)


def reads_along(module: nn.Module, dim: int) -> bool:
    """Whether dimension `dim` of the weights of `module` is the dimension of its inputs."""
    matrix = matrix_of(module)
    return matrix.in_dim == dim if matrix is not None else is_experts(module) and dim == 2


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds the fused weights of many experts: `(n_experts, ..., ...)`."""
    stacks = [len(parameter) for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return len(stacks) >= 2 and stacks[0] > 1 and len(set(stacks)) == 1


def is_channelwise(module: nn.Module) -> bool:
    """Whether `module` computes every channel separately, with parameters of shape `(channels,)`."""
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)


def is_norm(module: nn.Module) -> bool:
    """Whether all parameters of `module` are vectors with one value per channel, as in layer norms and scales."""
    vectors = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 1]
    is_leaf = not any(True for _ in module.children())
    return (
        is_leaf and bool(vectors) and len(vectors) == sum(1 for _ in module.parameters()) and matrix_of(module) is None
    )


def set_sizes_(module: nn.Module) -> None:
    """Sets the attributes of a layer that contain the sizes of its tensors."""
    matrix = matrix_of(module)
    if matrix is not None:
        for name in matrix.out_sizes:
            setattr(module, name, module.weight.shape[matrix.out_dim])
        for name in matrix.in_sizes:
            setattr(module, name, module.weight.shape[matrix.in_dim])
    elif is_channelwise(module):
        module.num_features = len(module.running_mean)
    elif is_experts(module) and "intermediate_dim" in vars(module):
        module.intermediate_dim = module.down_proj.shape[-1]
    elif isinstance(vars(module).get("normalized_shape"), tuple) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def random_output(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers that replace the output of a layer; positive, so that no ReLU is zero."""
    return torch.rand(shape, dtype=torch.float32).add_(0.5).to(dtype if dtype.is_floating_point else torch.float32)
