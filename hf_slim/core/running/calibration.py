"""Runs a few batches through a model before training, for what only activations or gradients can tell."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimDataError
from hf_slim.core.modules import device_of, evaluating

ITEM_COUNT = "num_items_in_batch"  # what a Trainer adds to batches, for losses
Batches = Iterable[dict[str, Any]]


class RunBatches(Protocol):
    """Runs all calibration batches through a model, from the first one in every call."""

    def __call__(self, with_gradient: bool = False) -> Iterator[None]:
        """Yields after each batch; with `with_gradient`, after the gradients of its loss were added up."""


@contextmanager
def calibrating(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    precision: torch.dtype | None = None,
    shown: Callable[[Batches], Batches] = iter,
) -> Iterator[RunBatches]:
    """A function that runs `batches` through `model`, which is in evaluation mode until the block ends.

    Every module is in its mode of before afterwards, also after an error. Gradients are left in place.

    Args:
        batches: Keyword arguments of forward passes. Tensors are moved to the device of the model.
        precision: What autocast computes in, such as the run's `precision_of_run`; None: as the caller computes.
        shown: Wraps the batches of every call, to show how far it has come.
    Raises: SlimDataError: where gradients are wanted and the model gives no loss.
    """

    def run(with_gradient: bool = False) -> Iterator[None]:
        device = device_of(model)
        for batch in shown(batches):
            inputs = {name: _placed(value, device) for name, value in batch.items()}
            computing = nullcontext() if precision is None else torch.autocast(device.type, precision)
            with torch.set_grad_enabled(with_gradient), computing:
                made = model(**inputs)
            if with_gradient:
                _loss_of(made).backward()
            yield

    with evaluating(model):
        yield run


def first_batches(batches: Iterable[dict[str, Any]] | None, count: int) -> list[dict[str, Tensor]]:
    """The first `count` batches of a Trainer's data loader, reduced to the tensors that forward passes take."""
    return [
        {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != ITEM_COUNT}
        for batch in itertools.islice(batches or (), count)
    ]


def precision_of_run(bf16: bool, fp16: bool) -> torch.dtype | None:
    """What the Trainer's autocast computes in, by these fields of `TrainingArguments`; None: it uses no autocast."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None


def first_that_fit(sizes: Mapping[str, int], limit: int) -> list[str]:
    """The first names whose sizes add up to at most `limit`, and always the very first: what one pass can serve.

    Args:
        sizes: Name -> size, in the order in which they are served.
    """
    chosen: list[str] = []
    total = 0
    for name, size in sizes.items():
        total += size
        if chosen and total > limit:
            break
        chosen.append(name)
    return chosen


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _loss_of(made: Any) -> Tensor:
    loss = made.get("loss") if isinstance(made, Mapping) else getattr(made, "loss", None)
    if loss is None:
        raise SlimDataError("This criterion needs a loss, and the model gave none: batches must hold `labels`.")
    return loss
