"""Settings of quantization: which layers, on which grids, and how scales are initialised and trained."""

from dataclasses import dataclass, field
from typing import Any

from hf_slim.core.config import SlimConfig, require_share, require_whole
from hf_slim.core.errors import SlimConfigError, nearest
from hf_slim.quantization.grids.observers import OBSERVERS
from hf_slim.quantization.scheme import SCHEMES, Scheme

LEARN = (None, "lsq", "lsq+")
LEARN_ACTIVATIONS = (None, "lsq", "lsq+", "pact")
INITIALIZE = ("nearest", "gptq")
KV_CACHE = (None, "int8", "int4")
SAVE_FORMATS = ("auto", "compressed-tensors", "gemma", "bitsandbytes", "slim")


@dataclass(frozen=True)
class QuantizationConfig(SlimConfig):
    """The quantization grids of the layers, how their scales are found, and whether they are trained.

    Layers are linear layers, token embeddings, GPT-2's Conv1D, convolutions and fused experts.
    """

    scheme: str | dict[str, Any] | Scheme = field(default="w8a8", metadata={"choices": SCHEMES})
    """Grids of the weights and of the activations of every layer: a registered name, a name with options such as
    `w4a16-g64-asym`, or a mapping of the settings of `Scheme`. `wXaY` stands for X-bit weights and Y-bit activations;
    `a16` leaves activations in floating point. Options: `g64` one scale for every 64 inputs, `tensor` one scale for
    the whole weight, `asym` a zero point, `unsigned` and `floor` for the codes, `static` calibrated activation
    scales."""

    group_size: int | None = None
    """Input features that share one weight scale, a whole number of at least 1 that divides the inputs of every layer.
    `null`: the group size of `scheme`."""

    embeddings: str | dict[str, Any] | Scheme | None = field(default=None, metadata={"choices": SCHEMES})
    """Scheme of the token embedding and of an output head that is tied to it, such as `w8a16`. `null` leaves both in
    floating point."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Other schemes for some layers: a mapping from a pattern of layer names, with `*` as wildcard, to a scheme, such
    as `{"*.down_proj": w8a8}`. If several patterns match, the last one counts. Empty: every layer uses `scheme`."""

    ignore: tuple[str, ...] = ()
    """Patterns, with `*` as wildcard, of names of layers that remain in floating point, such as `*.lm_head`. A pattern
    that matches no layer is an error."""

    observer: str = field(default="minmax", metadata={"choices": OBSERVERS})
    """How the scales of the weights are found: a registered observer. With `minmax` they are computed from the weights
    in every step, unless `learn` or `initialize: gptq` is set; with the other observers they are computed once, before
    training."""

    learn: str | None = field(default=None, metadata={"choices": LEARN})
    """Whether the scales of the weights are trained parameters: `lsq` trains scales, `lsq+` zero points as well.
    `null`: they are not trained."""

    learn_activations: str | None = field(default=None, metadata={"choices": LEARN_ACTIVATIONS})
    """Whether static activation scales are trained parameters: `lsq`, `lsq+` (zero points as well) or `pact` (gradient
    from clipped values only). Needs a scheme with the option `static`. `null`: they are not trained."""

    initialize: str = field(default="nearest", metadata={"choices": INITIALIZE})
    """How the weights are rounded before training: `nearest`, or `gptq`, which corrects the weights of linear layers
    by second-order rounding on `calibration_batches` batches."""

    calibration_batches: int = 8
    """Training batches that `initialize: gptq` and static activation scales use, a whole number of at least 1."""

    start: float = 0.0
    """Progress of training (share of the optimizer steps done) from which weights and activations are rounded, in [0,
    1); 0 rounds from the first step."""

    freeze: float = 1.0
    """Progress of training from which scales and zero points no longer change, in [0, 1]; 1 never freezes them."""

    kv_cache: str | None = field(default=None, metadata={"choices": KV_CACHE})
    """Grid of the cached keys and values: `int8` or `int4`. They are rounded while training and stored as codes by
    `generate`. `null` leaves them in floating point."""

    save_format: str = field(default="auto", metadata={"choices": SAVE_FORMATS})
    """Format of the saved folder. `auto`: the first that holds the result exactly, of `compressed-tensors`, `gemma`,
    `bitsandbytes` (all load in transformers without hf_slim) and `slim` (needs hf_slim). A format that cannot hold the
    result is refused before training, with the schemes that it holds."""

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
            raise SlimConfigError(
                f"`ignore` must be a list of patterns, got the string {self.ignore!r}: write [{self.ignore!r}]."
            )
        put(self, "ignore", tuple(self.ignore))  # a list in JSON
        if not isinstance(self.overrides, dict):
            raise SlimConfigError(f"`overrides` must map patterns to schemes, got {self.overrides!r}.")
        put(self, "overrides", {name: _checked(scheme) for name, scheme in self.overrides.items()})

    def _check_choices(self) -> None:
        for name, choices in (("learn", LEARN), ("learn_activations", LEARN_ACTIVATIONS), ("kv_cache", KV_CACHE)):
            value = vars(self)[name]
            if value not in choices:
                raise SlimConfigError(f"Unknown `{name}` {value!r}. {nearest(str(value), filter(None, choices))}")
        if self.save_format not in SAVE_FORMATS:
            raise SlimConfigError(
                f"Unknown `save_format` {self.save_format!r}. {nearest(str(self.save_format), SAVE_FORMATS)}"
            )
        if self.initialize not in INITIALIZE:
            raise SlimConfigError(
                f"Unknown `initialize` {self.initialize!r}. {nearest(str(self.initialize), INITIALIZE)}"
            )
        OBSERVERS[self.observer]

    def linear_scheme(self) -> Scheme:
        """The scheme of every layer that no override matches."""
        return Scheme.of(self.scheme).with_groups(self.group_size)

    def embedding_scheme(self) -> Scheme | None:
        """The scheme of the embedding and its tied head."""
        return Scheme.of(self.embeddings) if self.embeddings else None

    @property
    def stores_scales(self) -> bool:
        """Whether scales are stored, instead of computed from the weights in every forward pass."""
        return self.learn is not None or self.observer != "minmax" or self.freeze < 1 or self.initialize == "gptq"


def _checked(scheme: str | dict[str, Any] | Scheme) -> str | dict[str, Any]:
    """The given scheme, as JSON if it is a `Scheme`. Raises SlimConfigError if it is not a valid scheme."""
    found = Scheme.of(scheme)
    return found.to_json() if isinstance(scheme, Scheme) else scheme
