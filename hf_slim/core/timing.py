"""Time, taken side by side: every repetition runs all candidates in turn, so that noise hits them alike."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

WARM_UPS = 1
Name = TypeVar("Name")


def interleaved_ms(
    candidates: dict[Name, Callable[[], object]],
    repeats: int,
    shown: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[Name, list[float]]:
    """Wall-clock milliseconds of each call, `repeats` per candidate, taken in turn after one warm-up each.

    Args:
        shown: Wraps the rounds, to show how far they have come.
    """
    samples: dict[Name, list[float]] = {name: [] for name in candidates}
    for repeat in shown(range(-WARM_UPS, repeats)):
        for name, call in candidates.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if repeat >= 0:
                samples[name].append((time.perf_counter() - start) * 1000)
    return samples


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
