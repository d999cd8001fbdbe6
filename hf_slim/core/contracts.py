"""What the techniques promise each other, as types: they never import one another.

Quantization builds the layers, pruning cuts them, distillation copies the model they are in, and integration writes
them down. Everything that one of them may read or call on another's layers or hooks is declared here.
"""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

_KEPT_COLUMNS = "kept_columns"


class PreparedLayer:
    """Base of a layer in its training-time form: float masters, forward on a grid.

    Attributes:
        scheme: The grids that it is trained on.
        columns: Weight name -> number of columns of its matrix, what a product sums over.
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
        """Called after rows were cut out of weight `name`: drops what the layer stores about the others.

        Args:
            kept: Indices of the rows that are left.
        """

    def keep_columns_(self, name: str, count: int) -> None:
        """Called after columns were cut out of weight `name`, of which `count` are left."""
        self.columns = self.columns | {name: count}


class PackedLayer:
    """Base of a layer in its final form: integer codes in place of float weights.

    Attributes:
        scheme: The grids of weights and activations.
        columns: Weight name -> number of columns of its matrix; of linear layers and embeddings absent.
    """

    scheme: Any
    columns: dict[str, int]

    @abstractmethod
    def float_shape(self, name: str) -> tuple[int, ...]:
        """The shape that weight `name` has in floating point."""

    def mark_filled_(self) -> None:
        """Called once the layer holds values; until then its weights must have the shapes that the file has."""

    @abstractmethod
    def kernel(self, input: Tensor) -> str:
        """How `forward` computes for this input: the name of a kernel, or "dequantize"."""


class PreparedHook:
    """Base of an object whose methods are forward hooks while a model is prepared; a plain copy does not have them."""


def set_kept_columns_(layer: nn.Module, kept: dict[str, Tensor] | None) -> None:
    """Notes which columns of a layer's weights pruning will keep, for the grids that group columns.

    Args:
        kept: Weight name -> indices of the columns that are kept; None or a missing name: all.
    """
    layer.__dict__[_KEPT_COLUMNS] = kept or None


def kept_columns(layer: nn.Module, name: str) -> Tensor | None:
    """The columns of weight `name` that pruning will keep; None: all."""
    return (layer.__dict__.get(_KEPT_COLUMNS) or {}).get(name)


def hand_on_kept_columns_(layer: nn.Module, other: nn.Module) -> None:
    """Lets `other`, which replaces `layer`, keep the same columns."""
    other.__dict__[_KEPT_COLUMNS] = layer.__dict__.get(_KEPT_COLUMNS)
