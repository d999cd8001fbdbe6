"""Interfaces between the techniques, which never import each other.

Quantization creates the layers, pruning removes parts of them, distillation copies the model that has them, and
integration saves them. All attributes and methods that they use of each other's layers and hooks are declared here.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

_KEPT_COLUMNS = "kept_columns"


class PreparedLayer:
    """Base of a layer in its training-time form: float parameters, rounded in the forward pass.

    Attributes:
        scheme: The grids of weights and activations.
        columns: Weight name -> number of columns of its matrix; a matrix product sums over the columns.
    """

    scheme: Any
    columns: dict[str, int]

    @abstractmethod
    def plain(self) -> nn.Module:
        """The ordinary layer with the same parameters."""

    @abstractmethod
    def matrices(self) -> dict[str, Tensor]:
        """Every weight on a grid by name, as float `(rows, columns)`."""

    def keep_rows_(self, name: str, kept: Tensor) -> None:
        """Called after rows of weight `name` were removed: deletes the state of the removed rows.

        Args:
            kept: Indices of the rows that are kept.
        """

    def keep_columns_(self, name: str, count: int) -> None:
        """Called after columns of weight `name` were removed; `count` columns are kept."""
        self.columns = self.columns | {name: count}


class PackedLayer:
    """Base of a layer in its final form: integer codes instead of float weights.

    Attributes:
        scheme: The grids of weights and activations.
        columns: Weight name -> number of columns of its matrix; linear layers and embeddings do not have it.
    """

    scheme: Any
    columns: dict[str, int]

    @abstractmethod
    def float_shape(self, name: str) -> tuple[int, ...]:
        """The shape that weight `name` has in floating point."""

    def mark_filled_(self) -> None:
        """Called once the layer holds values; until then its weights must have the shapes of the file."""

    @abstractmethod
    def kernel(self, input: Tensor) -> str:
        """The name of the kernel that `forward` uses for this input; "dequantize" is the float copy."""


class PreparedHook:
    """Base of an object whose methods are forward hooks of a prepared model; `plain_copy` removes them."""


def set_kept_columns_(layer: nn.Module, kept: dict[str, Tensor] | None) -> None:
    """Sets the columns of a layer's weights that pruning will keep, for grids that group columns.

    Args:
        kept: Weight name -> indices of the columns that are kept; None or a missing name: all.
    """
    layer.__dict__[_KEPT_COLUMNS] = kept or None


def kept_columns(layer: nn.Module, name: str) -> Tensor | None:
    """The columns of weight `name` that pruning will keep; None: all."""
    return (layer.__dict__.get(_KEPT_COLUMNS) or {}).get(name)


def copy_kept_columns_(layer: nn.Module, other: nn.Module) -> None:
    """Copies the kept columns of `layer` to `other`, which replaces it."""
    other.__dict__[_KEPT_COLUMNS] = layer.__dict__.get(_KEPT_COLUMNS)
