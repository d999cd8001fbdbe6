"""Runs a few batches through a model before training, to measure activations or gradients."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimDataError
from hf_slim.core.modules import device_of, evaluating

ITEM_COUNT = "num_items_in_batch"  # a Trainer adds it to batches, for losses
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
    """Context with a function that runs `batches` through `model`, which is in evaluation mode.

    The mode of every module is restored on exit, also after an error. Gradients are not deleted.

    Args:
        batches: Keyword arguments of forward passes. Tensors are moved to the device of the model.
        precision: Dtype of autocast, such as `precision_of_run`; None: autocast is as the caller has set it.
        shown: Wraps the batches of every call, for example in a progress bar.
    Raises: SlimDataError: if gradients are needed and the model returns no loss.
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
    """The first `count` batches of a Trainer's data loader, with only the tensors that the forward pass takes."""
    return [
        {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != ITEM_COUNT}
        for batch in itertools.islice(batches or (), count)
    ]


def precision_of_run(bf16: bool, fp16: bool) -> torch.dtype | None:
    """The dtype of the Trainer's autocast, from these fields of `TrainingArguments`; None: no autocast."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None


def first_that_fit(sizes: Mapping[str, int], limit: int) -> list[str]:
    """The first names whose sizes add up to at most `limit`; always at least one name.

    Args:
        sizes: Name -> size, in order.
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
        raise SlimDataError("This criterion needs a loss, and the model returned none: batches must hold `labels`.")
    return loss
