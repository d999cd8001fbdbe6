"""Schemes: the grids of a layer's weights and activations, by name or in full."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimConfigError, SlimError
from hf_slim.core.registry import Registry
from hf_slim.quantization.grids import kinds  # noqa: F401  registers the families of grids
from hf_slim.quantization.grids.grid import Grid

_NAME = re.compile(r"(?P<name>[a-z0-9.]+)(?P<options>(-(g\d+|asym|unsigned|floor|tensor|static))*)")
_BITS = re.compile(r"w(?P<weights>[2-8])a(?P<activations>[2-8]|16)")


@dataclass(frozen=True)
class Scheme(SlimConfig):
    """The grid of a layer's weights, and the grid of its input.

    Activation grids have granularity `token` (a scale is computed for each token) or `tensor` (one scale, calibrated
    on the first training batches).
    """

    weights: Grid
    """Grid of the weights, with granularity `tensor`, `channel` or `group`."""

    activations: Grid | None = None
    """Grid of the layer's input, of kind `int` or `fp8`, with granularity `token` or `tensor`. `null` leaves it in
    floating point."""

    def __post_init__(self) -> None:
        for name in ("weights", "activations"):
            if isinstance(given := vars(self)[name], dict):
                object.__setattr__(self, name, Grid.from_dict(given))
        if self.weights.granularity == "token":
            raise SlimConfigError("Weights need granularity 'tensor', 'channel' or 'group', got 'token'.")
        if self.activations is None:
            return
        if self.activations.granularity not in ("token", "tensor"):
            raise SlimConfigError(
                f"Activations need granularity 'token' or 'tensor', got '{self.activations.granularity}': their "
                "scales cannot differ along the features that a matrix product sums over."
            )
        if self.activations.kind not in ("int", "fp8"):
            raise SlimConfigError(f"Activations need a grid of kind 'int' or 'fp8', got '{self.activations.kind}'.")

    def __str__(self) -> str:
        short = self._short()
        return short if short is not None else f"{_describe(self.weights)} | {_describe(self.activations)}"

    def to_json(self) -> str | dict[str, Any]:
        """The scheme's name, or all its settings if it has none; `Scheme.of` restores an equal scheme."""
        return self._short() or self.to_dict()

    @classmethod
    def of(cls, scheme: "str | dict[str, Any] | Scheme") -> "Scheme":  # type: ignore[override]
        """The scheme with this name ("w8a8", "w4a16-g32") or these settings; a `Scheme` is returned unchanged."""
        if isinstance(scheme, str):
            return cls.parse(scheme)
        return super().of(scheme)

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """The scheme of a name such as "w4a16", with options: "w4a16-g32-asym".

        Options: `g<size>` groups of input features, `tensor` one weight scale, `asym` a zero point for the weights,
        `unsigned` and `floor` for the weights' codes, `static` calibrated activation scales.
        Raises: SlimConfigError: if `text` is not such a name.
        """
        match = _NAME.fullmatch(text)
        bits = _BITS.fullmatch(match["name"]) if match else None
        scheme = _integers(bits) if bits else SCHEMES[match["name"] if match else text]
        for option in filter(None, match["options"].split("-")):
            scheme = _with_option(scheme, option)
        return scheme

    def with_groups(self, group_size: int | None) -> "Scheme":
        """The same scheme with this group size for the weights; None: unchanged."""
        return dataclasses.replace(self, weights=self.weights.with_groups(group_size)) if group_size else self

    def _short(self) -> str | None:
        """The name that `parse` accepts for this scheme, or None if a name cannot express all its settings."""
        weights, activations = self.weights, self.activations
        if weights.kind == "int":
            name = f"w{weights.bits}a{activations.bits if activations else 16}"
        else:
            name = next((name for name in SCHEMES if SCHEMES[name].weights.kind == weights.kind
                         and SCHEMES[name].weights.bits == weights.bits), "")  # fmt: skip
        options = {
            f"g{weights.group_size}": weights.group_size and weights.group_size != _default_group(name),
            "tensor": weights.granularity == "tensor" and weights.kind != "ternary",
            "asym": not weights.symmetric,
            "unsigned": not weights.signed,
            "floor": weights.rounding == "floor",
            "static": activations is not None and activations.granularity == "tensor",
        }
        text = "-".join([name, *(option for option, applies in options.items() if applies)])
        try:
            return text if Scheme.parse(text) == self else None
        except SlimError:
            return None


def _integers(bits: re.Match) -> Scheme:
    activations = None if bits["activations"] == "16" else Grid(bits=int(bits["activations"]), granularity="token")
    return Scheme(Grid(bits=int(bits["weights"])), activations)


SCHEMES: Registry[Scheme] = Registry("quantization scheme")
for _name in ("w8a8", "w8a16", "w4a16", "w4a8", "w3a16", "w2a16"):
    SCHEMES.register(_name)(_integers(_BITS.fullmatch(_name)))
SCHEMES.register("w1.58a8")(Scheme(Grid("ternary", granularity="tensor"), Grid(granularity="token")))
SCHEMES.register("nf4")(Scheme(Grid("nf4", granularity="group", group_size=64)))
SCHEMES.register("fp4")(Scheme(Grid("fp4", granularity="group", group_size=64)))
for _bits in (4, 3, 2):
    SCHEMES.register(f"codebook{_bits}")(Scheme(Grid("codebook", _bits)))
SCHEMES.register("fp8")(Scheme(Grid("fp8"), Grid("fp8", granularity="token")))


def _with_option(scheme: Scheme, option: str) -> Scheme:
    if option.startswith("g"):
        return scheme.with_groups(int(option[1:]))
    if option == "static":
        if scheme.activations is None:
            raise SlimConfigError(
                "Option 'static' needs quantized activations, and this scheme leaves them in floating point. Use one "
                "such as 'w8a8-static'."
            )
        return dataclasses.replace(scheme, activations=dataclasses.replace(scheme.activations, granularity="tensor"))
    changes = {
        "tensor": {"granularity": "tensor", "group_size": None},
        "asym": {"symmetric": False},
        "unsigned": {"signed": False},
        "floor": {"rounding": "floor"},
    }
    return dataclasses.replace(scheme, weights=dataclasses.replace(scheme.weights, **changes[option]))


def _default_group(name: str) -> int | None:
    return SCHEMES[name].weights.group_size if name in SCHEMES else None


def _describe(grid: Grid | None) -> str:
    if grid is None:
        return "float"
    held = vars(grid)
    changed = {f.name: held[f.name] for f in dataclasses.fields(grid) if held[f.name] != f.default}
    return ", ".join(f"{name} {value}" for name, value in changed.items())
