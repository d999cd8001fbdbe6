"""Which stand-in takes the place of each packed layer; tied layers share one matrix."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_slim.core.contracts import PackedLayer
from hf_slim.export.codes import codes_of, float_values, is_packed_weight, weights_of
from hf_slim.export.graphs.matrices import (
    Matrix,
    as_blocks,
    as_groups,
    as_integers,
    block_of,
    multiplies_integers,
    width_of,
)
from hf_slim.export.graphs.rounding import round_inputs_
from hf_slim.quantization.layers.packed import PackedEmbedding, PackedLinear
from hf_slim.quantization.layers.training import with_class

INTEGERS, BLOCKS, GROUPS, FLOATS = "integers", "blocks", "groups", "floats"


@dataclass(frozen=True)
class Kit:
    """The stand-ins of one target.

    Attributes:
        linear: Form -> `(layer, matrix)` -> the module in the place of a packed linear layer.
        embedding: Form -> `matrix` -> the module in the place of a packed embedding.
    """

    linear: dict[str, Callable[[PackedLinear, Matrix], nn.Module]]
    embedding: dict[str, Callable[[Matrix], nn.Module]]


class StandIns:
    """The stand-ins for the packed layers of one model: call it with a path and the module there.

    Attributes:
        forms: Path of a packed weight -> the form in which the graph holds it; tied weights under each of their paths.
    """

    def __init__(self, model: PreTrainedModel, kit: Kit):
        self.model, self.kit = model, kit
        self.owners = weights_of(model)
        self.forms = forms_of(model, kit)
        self.matrices: dict[tuple[str, str], Matrix] = {}

    def __call__(self, path: str, module: nn.Module) -> nn.Module | None:
        """The stand-in for a packed layer; None for any other module."""
        if not isinstance(module, PackedLayer):
            return None
        weight = f"{path}.weight"
        if isinstance(module, PackedLinear):
            return self.kit.linear[self.forms[weight]](module, self._matrix(weight))
        if isinstance(module, PackedEmbedding):
            return self.kit.embedding[self.forms[weight]](self._matrix(weight))
        return self._with_float_weights(path, module)

    def _matrix(self, path: str) -> Matrix:
        """The matrix of a weight, one object for all that are tied to it."""
        key = self.owners[path], self.forms[path]
        if key not in self.matrices:
            self.matrices[key] = matrix_of(self.model, *key)
        return self.matrices[key]

    def _with_float_weights(self, path: str, module: nn.Module) -> nn.Module:
        """A layer such as a convolution as it was before packing, its input rounded in a hook."""
        plain = with_class(module, type(module).__mro__[1])
        for name in module.columns:
            values = float_values(self.model, f"{path}.{name}").contiguous()
            plain._parameters[name] = nn.Parameter(values, requires_grad=False)
            for buffer in [key for key in plain._buffers if key.startswith(f"{name}_")]:
                del plain._buffers[buffer]
        for name, value in plain._parameters.items():
            if value is not None and value.is_floating_point():
                plain._parameters[name] = nn.Parameter(value.detach().float().cpu(), requires_grad=False)
        if module.scheme.activations is not None:
            round_inputs_(plain, module.scheme.activations)
        return plain


def forms_of(model: PreTrainedModel, kit: Kit) -> dict[str, str]:
    """The form of every packed weight, by path; an embedding has the form of a head that it is tied to."""
    owners = {path: owner for path, owner in weights_of(model).items() if is_packed_weight(model, path)}
    forms = {path: _own_form(model, path, kit) for path in owners}
    heads = {owners[path]: form for path, form in forms.items() if isinstance(_layer(model, path), PackedLinear)}
    return {
        path: heads.get(owners[path], form) if isinstance(_layer(model, path), PackedEmbedding) else form
        for path, form in forms.items()
    }


def matrix_of(model: PreTrainedModel, path: str, form: str) -> Matrix:
    """The matrix of a packed weight in one form, on the CPU."""
    if form == FLOATS:
        return float_values(model, path)
    return {INTEGERS: as_integers, BLOCKS: as_blocks, GROUPS: as_groups}[form](codes_of(model, path))


def notes_on(model: PreTrainedModel, forms: dict[str, str]) -> tuple[str, ...]:
    """What a user should know about weights that the graph holds as floats."""
    floats = [path for path, form in forms.items() if form == FLOATS]
    if not floats:
        return ()
    kinds = Counter(str(_layer(model, path).scheme) for path in floats)
    schemes = ", ".join(f"{count} of {scheme}" for scheme, count in kinds.items())
    return (
        f"{len(floats)} packed weights are in the graph as float32 of the same values, which takes more space: no "
        f"operator holds their codes ({schemes}).",
    )


def _own_form(model: PreTrainedModel, path: str, kit: Kit) -> str:
    layer = _layer(model, path)
    if not isinstance(layer, PackedLinear | PackedEmbedding):
        return FLOATS
    grid, columns = layer.scheme.weights, layer.float_shape("weight")[1]
    if width_of(grid) is None:
        return FLOATS
    if INTEGERS in kit.linear and isinstance(layer, PackedLinear) and multiplies_integers(layer.scheme):
        return INTEGERS
    if BLOCKS in kit.linear and block_of(grid, columns) is not None:
        return BLOCKS
    return GROUPS if GROUPS in kit.linear and columns % (grid.group_size or columns) == 0 else FLOATS


def _layer(model: PreTrainedModel, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])
