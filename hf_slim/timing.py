"""Timing of several candidates: every repetition runs all of them in turn, so that noise affects all equally."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from hf_slim.progress import progress

WARM_UPS = 1
Name = TypeVar("Name")


def interleaved_ms(
    candidates: dict[Name, Callable[[], object]], repeats: int, title: str | None = None
) -> dict[Name, list[float]]:
    """Wall-clock milliseconds of each call, `repeats` per candidate, taken in turn after one warm-up each.

    Args:
        title: Title of a progress bar over the rounds; None: no bar.
    """
    samples: dict[Name, list[float]] = {name: [] for name in candidates}
    rounds = range(-WARM_UPS, repeats)
    for repeat in rounds if title is None else progress(rounds, title, "round"):
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
