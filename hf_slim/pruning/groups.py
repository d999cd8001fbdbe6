"""Groups: slices of several weights that must go together, found in a model."""

from dataclasses import dataclass

from torch import Tensor, nn

from hf_slim.core.errors import SlimError


@dataclass(frozen=True)
class Slice:
    """The part that one dimension of one layer plays in a group set.

    Attributes:
        module: Path of the linear layer.
        dim: 0 for output rows (with their bias), 1 for input columns.
        width: Consecutive rows or columns that belong to one group.
    """

    module: str
    dim: int
    width: int


@dataclass(frozen=True)
class GroupSet:
    """All prunable groups of one kind in one layer; group `i` owns rows or columns `[i * width, (i + 1) * width)`.

    Attributes:
        name: Path of the layer and the kind, unique in the model: "model.layers.0.mlp/ffn".
        kind: "ffn" or "kv_heads".
        count: How many groups there are.
        slices: Every weight that takes part; the consumer, whose columns read the group, comes last.
        attributes: (module path, attribute, value per group) of sizes that modules keep and that shrink too.
    """

    name: str
    kind: str
    count: int
    slices: tuple[Slice, ...]
    attributes: tuple[tuple[str, str, int], ...] = ()

    def parameters_per_group(self, model: nn.Module) -> int:
        """Weights and biases that one group takes with it."""
        total = 0
        for part in self.slices:
            layer = model.get_submodule(part.module)
            total += part.width * layer.weight.shape[1 - part.dim]
            total += part.width if part.dim == 0 and layer.bias is not None else 0
        return total


def weight_blocks(model: nn.Module, group_set: GroupSet) -> list[Tensor]:
    """The weights of a group set as blocks `(count, width, other)`, columns transposed to rows.

    All are views: writing to a block writes to the model.
    """
    return [_blocks(model.get_submodule(part.module).weight, part, group_set) for part in group_set.slices]


def gradient_blocks(model: nn.Module, group_set: GroupSet) -> list[Tensor]:
    """The gradients, in the shapes of `weight_blocks`. Raises SlimError if none has arrived."""
    blocks = []
    for part in group_set.slices:
        gradient = model.get_submodule(part.module).weight.grad
        if gradient is None:
            raise SlimError(
                f"No gradient reached '{part.module}.weight', so the importance of its groups is unknown. Unfreeze "
                "the layer, set the sparsity of its kind to 0, or choose a criterion that needs no gradient: l1 or l2."
            )
        blocks.append(_blocks(gradient, part, group_set))
    return blocks


def bias_blocks(model: nn.Module, group_set: GroupSet) -> list[Tensor]:
    """The biases that go with the groups, as views `(count, width)`."""
    layers = [(model.get_submodule(part.module), part) for part in group_set.slices if part.dim == 0]
    return [
        layer.bias.detach().unflatten(0, (group_set.count, part.width))
        for layer, part in layers
        if layer.bias is not None
    ]


def _blocks(tensor: Tensor, part: Slice, group_set: GroupSet) -> Tensor:
    rows = tensor.detach() if part.dim == 0 else tensor.detach().t()
    return rows.unflatten(0, (group_set.count, part.width))
