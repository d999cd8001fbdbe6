"""What to quantize, to which grid, and how the grid is found and trained."""

from dataclasses import dataclass, field
from typing import Any

from hf_slim.core.config import SlimConfig, require_share
from hf_slim.core.errors import SlimError, nearest
from hf_slim.quantization.grids.grid import require_whole
from hf_slim.quantization.grids.observers import OBSERVERS
from hf_slim.quantization.scheme import SCHEMES, Scheme

LEARN = (None, "lsq", "lsq+")
LEARN_ACTIVATIONS = (None, "lsq", "lsq+", "pact")
INITIALIZE = ("nearest", "gptq")
KV_CACHE = (None, "int8", "int4")


@dataclass(frozen=True)
class QuantizationConfig(SlimConfig):
    """Which grids the layers train on. By default scales follow the weights: the largest is representable."""

    scheme: str | dict[str, Any] | Scheme = field(
        default="w8a8",
        metadata={"help": f"Grids of every layer: {', '.join(SCHEMES)}; with options ('w4a16-g64-asym'), or in full."},
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Input features that share a weight scale; None: what the scheme says."}
    )
    embeddings: str | dict[str, Any] | Scheme | None = field(
        default=None,
        metadata={"help": "Grid of the token embedding and of an output head tied to it; None leaves them in float."},
    )
    overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Schemes by pattern of layer names, the last match counts: {'*.down_proj': 'w8a8'}."},
    )
    ignore: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Patterns of layer names to leave in float, such as '*.lm_head' or 'classifier*'."},
    )
    observer: str = field(default="minmax", metadata={"help": f"How weight scales are found: {', '.join(OBSERVERS)}."})
    learn: str | None = field(
        default=None, metadata={"help": "Train the weights' scales: lsq, or lsq+ (zero points too)."}
    )
    learn_activations: str | None = field(
        default=None, metadata={"help": "Train the scales of static activations: lsq, lsq+ or pact."}
    )
    initialize: str = field(
        default="nearest",
        metadata={"help": "How the starting weights are rounded: nearest, or gptq on the first batches."},
    )
    calibration_batches: int = field(
        default=8, metadata={"help": "Training batches that gptq and static activation scales look at."}
    )
    start: float = field(default=0.0, metadata={"help": "Share of training after which rounding switches on."})
    freeze: float = field(default=1.0, metadata={"help": "Share of training after which scales no longer move."})
    kv_cache: str | None = field(
        default=None, metadata={"help": "Grid of the keys and values that attention keeps: int8 or int4."}
    )

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "scheme", _checked(self.scheme))
        put(self, "embeddings", _checked(self.embeddings) if self.embeddings else None)
        if self.group_size is not None:
            require_whole("group_size", self.group_size)
        require_whole("calibration_batches", self.calibration_batches)
        require_share("start", self.start, upper_open=True)
        require_share("freeze", self.freeze)
        self._check_choices()
        if isinstance(self.ignore, str):
            raise SlimError(
                f"`ignore` must be a list of patterns, got the string {self.ignore!r}: write [{self.ignore!r}]."
            )
        put(self, "ignore", tuple(self.ignore))  # JSON brings lists
        if not isinstance(self.overrides, dict):
            raise SlimError(f"`overrides` must map patterns to schemes, got {self.overrides!r}.")
        put(self, "overrides", {name: _checked(scheme) for name, scheme in self.overrides.items()})

    def _check_choices(self) -> None:
        for name, choices in (("learn", LEARN), ("learn_activations", LEARN_ACTIVATIONS), ("kv_cache", KV_CACHE)):
            value = getattr(self, name)
            if value not in choices:
                raise SlimError(f"Unknown `{name}` {value!r}. {nearest(str(value), filter(None, choices))}")
        if self.initialize not in INITIALIZE:
            raise SlimError(f"Unknown `initialize` {self.initialize!r}. {nearest(str(self.initialize), INITIALIZE)}")
        OBSERVERS[self.observer]

    def linear_scheme(self) -> Scheme:
        """The grids of every layer that no override names."""
        return Scheme.of(self.scheme).with_groups(self.group_size)

    def embedding_scheme(self) -> Scheme | None:
        """The grids of the embedding and its tied head."""
        return Scheme.of(self.embeddings) if self.embeddings else None

    @property
    def stores_scales(self) -> bool:
        """Whether scales are kept from step to step, rather than found anew from the weights in every forward."""
        return self.learn is not None or self.observer != "minmax" or self.freeze < 1 or self.initialize == "gptq"


def _checked(scheme: str | dict[str, Any] | Scheme) -> str | dict[str, Any]:
    """A scheme as it was given, one that is an object as JSON. Raises SlimError if there is no such scheme."""
    found = Scheme.of(scheme)
    return found.to_json() if isinstance(scheme, Scheme) else scheme
