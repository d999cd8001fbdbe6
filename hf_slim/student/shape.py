"""The shape of a student: which layers of the teacher it keeps, and their widths."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_slim.core.config import SlimConfig, require_whole
from hf_slim.core.errors import SlimConfigError
from hf_slim.core.registry import Registry
from hf_slim.pruning.budget.selection import least_first
from hf_slim.pruning.groups import GroupSet

# stack of layers, number of kept layers, importance of all -> indices of the kept layers
LayerChoice = Callable[[GroupSet, int, Tensor], list[int]]
CHOICES: Registry[LayerChoice] = Registry("choice of layers")


def even(stack: GroupSet, number: int, score: Tensor) -> list[int]:
    """Layers at even distances, with the first and the last among them.

    Source: Sanh et al. 2019, DistilBERT, arXiv:1910.01108, sec. 3.
    """
    return [round(step * (stack.count - 1) / max(number - 1, 1)) for step in range(number)]


def first(stack: GroupSet, number: int, score: Tensor) -> list[int]:
    """The first layers, without a gap."""
    return list(range(number))


def last(stack: GroupSet, number: int, score: Tensor) -> list[int]:
    """The last layers, without a gap, and all layers that cannot be removed."""
    free = [index for index in range(stack.count) if index not in stack.pinned]
    return sorted([*stack.pinned, *free[len(free) - (number - len(stack.pinned)) :]])


def importance(stack: GroupSet, number: int, score: Tensor) -> list[int]:
    """Layers with the highest importance, measured on data or on the weights."""
    return sorted(least_first(stack, score, [])[stack.count - number :].tolist())


CHOICES.register("even")(even)
CHOICES.register("first")(first)
CHOICES.register("last")(last)
CHOICES.register("importance")(importance)


@dataclass(frozen=True)
class StudentShape(SlimConfig):
    """Layers and widths of a student that is cut out of a teacher. The teacher's sizes are the defaults."""

    layers: list[int] | dict[str, list[int]] | None = None
    """Layers of the teacher that the student keeps, counted from 0, in ascending order; for a model with several
    stacks a mapping such as `{encoder: [0, 3], decoder: [0, 5]}`. `null`: `keep` decides, or all are kept."""

    keep: float | dict[str, float] | None = None
    """Share of the layers that is kept, in (0, 1]; for several stacks a mapping from stack to share. Set it instead of
    `layers`. `null`: all are kept."""

    choose: str = field(default="even", metadata={"choices": CHOICES})
    """Which layers are kept by `keep`: a registered choice of layers. `even`: at even distances, with the first and
    the last layer. Other choices need `keep`."""

    hidden: int | None = None
    """Width of the residual stream of the student, a whole number of at least 1 and at most the teacher's. `null`: the
    teacher's."""

    heads: int | None = None
    """Query heads in every layer, a whole number of at least 1. With grouped-query attention key-value heads are
    removed together with all their query heads. `null`: the teacher's."""

    ffn: int | None = None
    """Neurons of every feed-forward layer, or of every expert, a whole number of at least 1. `null`: the teacher's."""

    fresh: bool = False
    """Whether the student has this shape with random weights. `false`: it starts from the teacher's weights."""

    def __post_init__(self) -> None:
        CHOICES[self.choose]
        if self.layers is not None and self.keep is not None:
            raise SlimConfigError("`layers` and `keep` both determine which layers are kept. Set only one of them.")
        if self.choose != "even" and self.keep is None:
            raise SlimConfigError(
                f"`choose` {self.choose} needs `keep`, the share of layers that is kept: set `keep`, such as 0.5."
            )
        if self.choose == "importance" and self.fresh:
            raise SlimConfigError(
                "`fresh` starts from random weights, so all layers are equally important: remove `choose` importance."
            )
        for stack, indices in self.per_stack(self.layers).items():
            _check_indices(f"layers{stack and f'.{stack}'}", indices)
        for stack, share in self.per_stack(self.keep).items():
            _check_keep(f"keep{stack and f'.{stack}'}", share)
        for name, value in self.widths.items():
            if value is not None:
                require_whole(name, value)
        if not self.fresh and all(value is None for value in (self.layers, self.keep, *self.widths.values())):
            raise SlimConfigError(
                "Nothing to change: the student would be equal to the teacher. Set layers, keep, hidden, heads or "
                "ffn, or fresh for random weights."
            )

    @property
    def is_scored(self) -> bool:
        """Whether layers or groups are chosen by importance, which can be measured on data."""
        return not self.fresh and (self.choose == "importance" or any(self.widths.values()))

    @property
    def widths(self) -> dict[str, int | None]:
        """Name of each width -> its value; None: the teacher's."""
        return {"hidden": self.hidden, "heads": self.heads, "ffn": self.ffn}

    @staticmethod
    def per_stack(value: Any) -> dict[str, Any]:
        """Stack name -> `layers` or `keep`; the name "" means all stacks.

        Args:
            value: Either setting.
        """
        return {} if value is None else value if isinstance(value, dict) else {"": value}


def _check_indices(name: str, indices: Any) -> None:
    is_list = isinstance(indices, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
    if not is_list or not indices or indices != sorted(set(indices)):
        raise SlimConfigError(
            f"`{name}` must list layers in increasing order, each once, such as 0,3,6; got {indices!r}."
        )


def _check_keep(name: str, share: Any) -> None:
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise SlimConfigError(
            f"`{name}` must be in (0, 1], got {share!r}: it is the share of layers that is kept, such as 0.5."
        )


def parse_layers(texts: list[str] | None) -> list[int] | dict[str, list[int]] | None:
    """`layers` from the command line.

    Args:
        texts: ["0,3"], or per stack ["encoder=0,3", "decoder=0"]; None: not given.
    Raises: SlimConfigError: if a text cannot be parsed.
    """
    example = "--layers 0,3,6, or --layers encoder=0,3 decoder=0"
    return _per_stack(texts, lambda text: [int(number) for number in text.split(",")], example)


def parse_shares(texts: list[str] | None) -> float | dict[str, float] | None:
    """`keep` from the command line.

    Args:
        texts: ["0.5"], or per stack ["decoder=0.5"]; None: not given.
    Raises: SlimConfigError: if a text cannot be parsed.
    """
    return _per_stack(texts, float, "--keep 0.5, or --keep decoder=0.5")


def _per_stack(texts: list[str] | None, parse: Callable[[str], Any], example: str) -> Any:
    if texts is None:
        return None
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            return parse(texts[0])
        pairs = [text.split("=") for text in texts]
        return {stack: parse(value) for stack, value in pairs}
    except ValueError as error:
        raise SlimConfigError(f"'{' '.join(texts)}' cannot be parsed. Write {example}.") from error
