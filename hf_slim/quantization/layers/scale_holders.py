"""Quantizers: modules that hold the scales, zero points and codebook of one tensor, and round it to its grid."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.host import parameter_or_none
from hf_slim.core.modules import is_recomputing
from hf_slim.core.running.distributed import range_over_ranks_
from hf_slim.quantization.grids.codebook import fitted_codebook
from hf_slim.quantization.grids.fake_quant import (
    fake_quantize_static,
    fake_quantize_tokens,
    fake_quantize_weight,
    grouped,
    learned_state,
    observed_weight,
    slice_dims,
)
from hf_slim.quantization.grids.grid import Grid, GridState, observed_state
from hf_slim.quantization.grids.integer_product import codes_following, codes_on_scale
from hf_slim.quantization.grids.observers import OBSERVERS


class _Quantizer(nn.LayerNorm):
    """A LayerNorm by type only, so that Trainer applies no weight decay to its parameters.

    See `Trainer.get_decay_parameter_names`. State that is not used is None, and is not in checkpoints.
    """

    def __init__(self, grid: Grid):
        super().__init__(1, elementwise_affine=False)
        self.grid = grid
        self.enabled = True  # the setting `start` may enable rounding later
        for name in ("scale", "offset", "codebook"):
            self.register_parameter(name, None)
        self.register_buffer("zero_point", None)

    def extra_repr(self) -> str:
        return f"{self.grid.kind} {self.grid.bits}, {self.grid.granularity}"


class WeightQuantizer(_Quantizer):
    """Rounds a weight to its grid. By default it stores nothing: scales are computed in every forward pass.

    Args:
        shape: `(rows, columns)` of the weight.
        learn: None, "lsq" or "lsq+": scales (and offsets) are trained parameters.
        stored: Whether the scales that `observe_` finds are kept in a buffer.
    """

    def __init__(
        self, grid: Grid, shape: tuple[int, int], learn: str | None = None, stored: bool = False,
        device: torch.device | None = None,
    ):  # fmt: skip
        super().__init__(grid)
        rows, columns = shape
        scales = (1, 1, 1) if grid.granularity == "tensor" else (rows, grid.groups(columns), 1)
        empty = torch.ones(scales, dtype=torch.float32, device=device)
        if learn:
            self.scale = nn.Parameter(empty)
            if learn == "lsq+":
                self.offset = nn.Parameter(torch.zeros_like(empty))
        elif stored:
            del self.scale
            self.register_buffer("scale", empty)
        if (learn or stored) and not grid.symmetric and learn != "lsq+":
            self.zero_point = torch.zeros_like(empty)
        if grid.kind_of.learns_codebook:
            books = rows // (grid.codebook_channels or rows)
            self.codebook = nn.Parameter(torch.zeros(books, 2**grid.bits, dtype=torch.float32, device=device))

    def forward(self, weight: Tensor, kept_columns: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`weight` rounded to the grid, in `dtype`.

        Args:
            weight: `(rows, columns)`.
            kept_columns: Indices of the columns that pruning keeps. Only these form quantization groups, as in the
                smaller layer; the other columns of the result are zero. None: all.
        """
        if not self.enabled:
            return weight if dtype is None else weight.to(dtype)
        arguments = (self.grid, self.scale, self.offset, self.zero_point, self.codebook, dtype)
        if kept_columns is None or not self._depends_on_masked_columns():
            return fake_quantize_weight(weight, *arguments)
        if self.scale is not None and self.grid.group_size:
            raise SlimError(
                "Columns of a weight with stored group scales are being pruned, and such scales cannot be regrouped. "
                "Prune in a separate run first, or leave `learn`, `observer`, `freeze` and `initialize` at their "
                "defaults."
            )
        kept = fake_quantize_weight(weight.index_select(1, kept_columns), *arguments)
        return kept.new_zeros(weight.shape).index_copy(1, kept_columns, kept)

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of `weight` as float32, and their scales, for grids of `is_integer_product`.

        Returns: `(rows, columns)`, and `(rows, 1)` or `(1, 1)`.
        """
        if self.scale is not None:
            scale = learned_state(self.scale, None, None, self.grid).scale
            codes = codes_on_scale(weight, self.grid, self.scale, "lsq", weight.numel() / self.scale.numel())
        else:
            scale = observed_weight(weight, self.grid).scale
            codes = codes_following(weight, self.grid, scale.view(-1, 1))
        return codes, scale.view(-1, 1)

    def state(self, weight: Tensor) -> GridState:
        """Scales, zero points and codebook that the packed layer stores in addition to the codes of `weight`."""
        if self.scale is None:
            found = observed_weight(weight, self.grid)
            book = None if self.codebook is None else self.codebook.detach().sort(dim=-1).values
            return GridState(found.scale, found.zero_point, book)
        learned = learned_state(self.scale, self.offset, self.codebook, self.grid)
        return learned if self.zero_point is None else GridState(learned.scale, self.zero_point, learned.codebook)

    @torch.no_grad()
    def observe_(self, weight: Tensor, observer: str = "minmax") -> None:
        """Initialises the scales, zero points and codebook that this quantizer stores, from `weight`."""
        if weight.is_meta or not weight.numel():
            return
        values = grouped(weight, self.grid)
        if self.scale is not None:
            self.store_(OBSERVERS[observer](values, self.grid, slice_dims(self.grid)))
        if self.codebook is not None:
            scale = observed_weight(weight, self.grid).scale if self.scale is None else self.scale
            self.codebook.copy_(fitted_codebook(values / scale, len(self.codebook), self.grid.bits))

    @torch.no_grad()
    def store_(self, state: GridState) -> None:
        """Stores scales and zero points that were computed elsewhere."""
        self.scale.copy_(state.scale)
        if self.zero_point is not None and state.zero_point is not None:
            self.zero_point.copy_(state.zero_point)
        if self.offset is not None and state.zero_point is not None:
            self.offset.copy_(-state.zero_point * state.scale)

    def keep_rows_(self, kept: Tensor) -> None:
        """Keeps only the scales and zero points of the rows `kept`, after the other rows of the weight are removed."""
        if self.codebook is not None and len(self.codebook) > 1:
            raise SlimError("Rows cannot be removed from a weight with several codebooks. Unset `codebook_channels`.")
        for name in ("scale", "offset", "zero_point"):
            value = parameter_or_none(self, name)
            if value is not None and len(value) > 1:
                smaller = value.detach()[kept]
                setattr(self, name, nn.Parameter(smaller) if isinstance(value, nn.Parameter) else smaller)

    def _depends_on_masked_columns(self) -> bool:
        kind = self.grid.kind_of
        clean = kind.holds_zero and kind.ignores_zeros and self.offset is None and self.grid.rounding == "nearest"
        return self.grid.group_size is not None or not clean


class InputQuantizer(_Quantizer):
    """Rounds a layer's input to its grid: dynamic scales per token, or one scale from the first training batches.

    Args:
        dims: Dimensions of the input that share one scale per token.
        learn: None, "lsq", "lsq+" or "pact"; for static scales.
        calibration_batches: Training batches from which the range of a static scale is calibrated.
    """

    def __init__(
        self, grid: Grid, dims: tuple[int, ...] = (-1,), learn: str | None = None, calibration_batches: int = 8,
        device: torch.device | None = None,
    ):  # fmt: skip
        super().__init__(grid)
        self.dims, self.learn, self.calibration_batches = dims, learn, calibration_batches
        self.static = grid.granularity == "tensor" and grid.scale is None
        if self.static:
            self.register_buffer(
                "range", torch.zeros(2, dtype=torch.float32, device=device)
            )  # smallest and largest input so far
            self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64, device=device))
            if learn:
                self.scale = nn.Parameter(torch.ones(1, 1, 1, dtype=torch.float32, device=device))
                if learn == "lsq+":
                    self.offset = nn.Parameter(torch.zeros(1, 1, 1, dtype=torch.float32, device=device))
        self._calibrated = not self.static

    def forward(self, input: Tensor) -> Tensor:
        """`input` rounded to the grid; static scales are calibrated on the first batches of training."""
        if not self._calibrated:
            self._observe_(input)
        if not self.enabled or (self.static and not self._calibrated and not self.batches_seen):
            return input
        if not self.static:
            return fake_quantize_tokens(input, self.grid, self.dims)
        state = self.state()
        rule = "pact" if self.learn == "pact" else "lsq"
        if self.learn and self._calibrated:
            zero_point = state.zero_point if self.offset is None else None
            return fake_quantize_static(input, self.grid, self.scale, self.offset, zero_point, rule)
        rounded = fake_quantize_static(input, self.grid, state.scale, None, state.zero_point, rule)
        return self._with_gradients_for_all(rounded)

    @property
    def gives_codes(self) -> bool:
        """Whether `codes` can take the place of `forward`: rounding is on, and static scales have data or get it."""
        return self.enabled and (self._calibrated or self.training or bool(self.batches_seen))

    def codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of a layer's input as float32, and their scales, for grids of `is_integer_product`.

        Args:
            rows: `(tokens, features)`.
        Returns: `(tokens, features)`, and `(tokens, 1)` or `(1, 1)`.
        """
        if not self._calibrated:
            self._observe_(rows)
        if not self.static:
            scale = observed_state(rows.detach(), self.grid).scale
            return codes_following(rows, self.grid, scale), scale
        scale, rule = self.state().scale, "pact" if self.learn == "pact" else "lsq"
        own = self.scale if self.learn and self._calibrated else scale
        codes = codes_on_scale(rows, self.grid, own, rule, rows.shape[-1])
        return self._with_gradients_for_all(codes), scale.view(1, 1)

    def _with_gradients_for_all(self, rounded: Tensor) -> Tensor:
        """The same values; DDP needs a gradient for every parameter, also during calibration."""
        if not (self.learn and self.training) or self._calibrated:
            return rounded
        return rounded + sum(0 * parameter.sum() for parameter in self.parameters())

    def state(self) -> GridState:
        """The static scale and zero point, of shape `(1, 1, 1)`. Raises SlimError without calibration data."""
        if not self.batches_seen:
            raise SlimError(
                "Static activation scales are not calibrated. Train first, or run a few batches through the model in "
                "training mode (`model.train()`), before converting."
            )
        from_range = observed_state(self.range.view(1, 1, 2), self.grid)
        if not self.learn or not self._calibrated:
            return from_range
        learned = learned_state(self.scale, self.offset, None, self.grid)
        if self.offset is None and from_range.zero_point is not None:
            return GridState(learned.scale, from_range.zero_point)
        return learned

    @torch.no_grad()
    def _observe_(self, input: Tensor) -> None:
        if is_recomputing():
            return  # the batch has been seen
        if self.training and self.batches_seen < self.calibration_batches and input.numel():
            self.range[0] = torch.minimum(self.range[0], input.min())
            self.range[1] = torch.maximum(self.range[1], input.max())
            range_over_ranks_(self.range)  # every rank must round in the same way
            self.batches_seen += 1
            if self.batches_seen == self.calibration_batches and self.learn:
                found = observed_state(self.range.view(1, 1, 2), self.grid)
                self.scale.copy_(found.scale)
                if self.offset is not None and found.zero_point is not None:
                    self.offset.copy_(-found.zero_point * found.scale)
        self._calibrated = bool(self.batches_seen >= self.calibration_batches)


@contextmanager
def rounding_disabled(chosen: Iterable[_Quantizer]) -> Iterator[None]:
    """Context in which the quantizers `chosen` do not round; their state is restored on exit, also after an error."""
    states = [(quantizer, quantizer.enabled) for quantizer in chosen]
    try:
        for quantizer, _ in states:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in states:
            quantizer.enabled = enabled


def quantizers(model: nn.Module) -> Iterator[_Quantizer]:
    """Every quantizer of a prepared model."""
    return (module for module in model.modules() if isinstance(module, _Quantizer))
