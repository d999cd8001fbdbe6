"""What to quantize, and to which grid."""

from dataclasses import dataclass, field

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.core.registry import Registry


@dataclass(frozen=True)
class Scheme:
    """A symmetric integer grid for weights, and one for activations.

    Attributes:
        weight_bits: 4 or 8; the grid is the integers from -2**(bits-1) to 2**(bits-1) - 1, times a scale.
        activation_bits: 8 for dynamic int8, one scale per token; None leaves activations in floating point.
        group_size: Consecutive input features that share one weight scale; None for one scale per output channel.
    """

    weight_bits: int
    activation_bits: int | None = None
    group_size: int | None = None

    def __str__(self) -> str:
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"w{self.weight_bits}a{self.activation_bits or 16}{group}"

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """The scheme that `str` wrote: "w8a8", "w4a16-g32". Raises SlimError on anything else."""
        named, _, group = text.partition("-g")
        scheme = SCHEMES[named]
        return cls(scheme.weight_bits, scheme.activation_bits, int(group) if group else None)

    def groups(self, in_features: int) -> int:
        """Weight scales per output channel; the last group may be short in a pruned layer."""
        return -(-in_features // self.group_size) if self.group_size else 1


SCHEMES: Registry[Scheme] = Registry("quantization scheme")
SCHEMES.register("w8a8")(Scheme(8, 8))
SCHEMES.register("w8a16")(Scheme(8))
SCHEMES.register("w4a8")(Scheme(4, 8))
SCHEMES.register("w4a16")(Scheme(4))


@dataclass(frozen=True)
class QuantizationConfig(SlimConfig):
    """Which grid the layers train on. Scales follow the weights: the largest of a group is representable."""

    scheme: str = field(default="w8a8", metadata={"help": f"Grid of the linear layers, one of {', '.join(SCHEMES)}."})
    group_size: int | None = field(
        default=None,
        metadata={"help": "Input features that share a weight scale; None: one scale per output channel."},
    )
    embeddings: str | None = field(
        default=None,
        metadata={"help": "Grid of the token embedding and of an output head tied to it; None leaves them in float."},
    )
    ignore: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Patterns of layer names to leave in float, such as '*.lm_head' or 'classifier*'."},
    )

    def __post_init__(self) -> None:
        for name in filter(None, (self.scheme, self.embeddings)):
            SCHEMES[name]
        whole = isinstance(self.group_size, int) and not isinstance(self.group_size, bool)
        if self.group_size is not None and (not whole or self.group_size < 1):
            raise SlimError(f"`group_size` must be a positive whole number or None, got {self.group_size!r}.")
        if isinstance(self.ignore, str):
            raise SlimError(
                f"`ignore` must be a list of patterns, got the string {self.ignore!r}: write [{self.ignore!r}]."
            )
        object.__setattr__(self, "ignore", tuple(self.ignore))  # JSON brings lists

    def linear_scheme(self) -> Scheme:
        """The grid of the linear layers."""
        named = SCHEMES[self.scheme]
        return Scheme(named.weight_bits, named.activation_bits, self.group_size)

    def embedding_scheme(self) -> Scheme | None:
        """The grid of the embedding and its tied head: one scale per vocabulary row."""
        return SCHEMES[self.embeddings] if self.embeddings else None
