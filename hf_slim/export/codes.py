"""What exporters read from a model: the trained codes and scales of packed weights, and ordinary tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_slim.core.contracts import PackedLayer, PreparedLayer
from hf_slim.core.errors import SlimError
from hf_slim.quantization.grids.packing import unpack_codes
from hf_slim.quantization.layers.training import from_matrix
from hf_slim.quantization.scheme import Scheme
from hf_slim.quantization.storage import stored_state, unpacked

WHOLE_NUMBERS = ("int", "ternary")  # kinds of grids whose codes are numbers


@dataclass(frozen=True)
class Codes:
    """One packed weight: value = (code - zero point) * scale, computed in float32, for every `group_size` columns.

    Attributes:
        scheme: The grids of the weight and of the layer's input.
        shape: Of the weight in floating point; `(rows, columns)` for linear layers and embeddings.
        group_size: Columns that share a scale; all columns where a row or the whole matrix has one scale.
        codes: Signed whole numbers, int16 `(rows, columns)`; from -1 to 1 on a ternary grid.
        scale: float32 `(rows, groups)`; the last group may be shorter.
        zero_point: float32 `(rows, groups)`, or None for 0.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    group_size: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @property
    def bits(self) -> int:
        """Bits of one code; 2 on a ternary grid."""
        return self.scheme.weights.bits  # type: ignore[return-value]  # a grid fills in its kind's default

    @property
    def one_scale(self) -> bool:
        """Whether the whole matrix has one scale."""
        return self.scheme.weights.granularity == "tensor" or self.scheme.weights.scale is not None

    def scale_in_groups(self, size: int) -> Tensor:
        """A scale for every `size` columns: float32 `(rows, columns / size)`.

        Raises: SlimError: if `size` does not divide the groups, or the columns where a row has one group.
        """
        columns, groups = self.codes.shape[1], self.scale.shape[1]
        if columns % size or (groups > 1 and self.group_size % size):
            raise SlimError(f"Groups of {self.group_size} in rows of {columns} columns cannot be cut into {size}.")
        if groups == 1:
            return self.scale.expand(-1, columns // size)
        return self.scale.repeat_interleave(self.group_size // size, dim=1)[:, : columns // size]


def weights_of(model: nn.Module) -> dict[str, str]:
    """Every parameter that is stored, by path, and the same paths of tied ones: path -> path of its owner.

    Raises: SlimError: if the model is in its training-time form.
    """
    prepared = [name for name, module in model.named_modules() if isinstance(module, PreparedLayer)]
    if prepared:
        raise SlimError(
            f"'{prepared[0]}' is in its training-time form. Call `convert(model)`, or give a folder that "
            "`trainer.save_model` wrote at the end of training."
        )
    first: dict[int, str] = {}
    found = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                path = f"{module_name}.{name}".lstrip(".")
                found[path] = first.setdefault(id(parameter), path)
    return found


def is_packed_weight(model: nn.Module, path: str) -> bool:
    """Whether the parameter at `path` holds codes."""
    module_name, _, name = path.rpartition(".")
    module = model.get_submodule(module_name)
    stored = module._parameters[name]
    return isinstance(module, PackedLayer) and stored is not None and stored.dtype == torch.int8


def schemes_of(model: nn.Module) -> dict[str, Scheme]:
    """The schemes of the packed weights, by path of the parameter; tied ones are named once, by their owner."""
    owners = {path for path, owner in weights_of(model).items() if path == owner}
    return {
        path: model.get_submodule(path.rpartition(".")[0]).scheme
        for path in sorted(owners)
        if is_packed_weight(model, path)
    }


def float_values(model: nn.Module, path: str) -> Tensor:
    """The values of any weight in its own shape, on the CPU: what training saw, bit for bit.

    Packed weights are float32, others have their own dtype.
    """
    module_name, _, name = path.rpartition(".")
    module = model.get_submodule(module_name)
    if not is_packed_weight(model, path):
        return module._parameters[name].detach().cpu()
    matrix = unpacked(module, name, _columns(module, name), torch.float32).cpu()
    return from_matrix(matrix, module.float_shape(name), vars(module).get("transposed", False))


def codes_of(model: nn.Module, path: str) -> Codes:
    """Codes and scales of the packed weight at `path`, on the CPU.

    Raises: SlimError: for grids whose codes are not numbers: nf4, fp4, fp8, learned codebooks.
    """
    module_name, _, name = path.rpartition(".")
    module = model.get_submodule(module_name)
    grid, shape = module.scheme.weights, module.float_shape(name)
    if grid.kind not in WHOLE_NUMBERS:
        raise SlimError(
            f"'{path}' lies on a grid of kind '{grid.kind}', whose values are not evenly spaced: it has no integer "
            f"codes. Grids with integer codes: {', '.join(WHOLE_NUMBERS)}."
        )
    columns = _columns(module, name)
    size = grid.group_size or columns
    packed = module._parameters[name].detach().cpu()
    stored, rows = unpack_codes(packed, grid.storage_bits, size), len(packed)
    numbers = grid.kind_of.decode(stored, grid, None).flatten(1)[:, :columns].to(torch.int16)
    state = stored_state(module, name, grid)
    spread = (rows, grid.groups(columns), 1)  # a fixed scale has no dimensions, that of a whole matrix (1, 1, 1)
    scale = state.scale.cpu().expand(spread).squeeze(-1)
    zero_point = None if state.zero_point is None else state.zero_point.cpu().expand(spread).squeeze(-1)
    return Codes(module.scheme, shape, size, numbers, scale, zero_point)


def _columns(module: nn.Module, name: str) -> int:
    return vars(module).get("columns", {}).get(name, module.float_shape(name)[-1])
