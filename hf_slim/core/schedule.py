"""Schedules: how far a gradual change has come, as a function of training progress."""

from collections.abc import Callable

from hf_slim.core.registry import Registry

Schedule = Callable[[float], float]
SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("linear")
def linear(fraction: float) -> float:
    """The same amount in every step."""
    return fraction


@SCHEDULES.register("cubic")
def cubic(fraction: float) -> float:
    """Much at first, little at the end, so that the model can recover. Zhu and Gupta 2017, arXiv:1710.01878, eq. 1."""
    return 1 - (1 - fraction) ** 3


@SCHEDULES.register("one_shot")
def one_shot(fraction: float) -> float:
    """Everything at the stop, nothing before."""
    return float(fraction >= 1)


def scheduled(name: str, progress: float, start: float, stop: float) -> float:
    """Share of the final amount that is due now, in [0, 1].

    Args:
        name: A registered schedule.
        progress: Share of training that is done, in [0, 1].
        start: Progress up to which nothing happens.
        stop: Progress from which everything has happened; not below `start`.
    """
    if progress >= stop:
        return 1.0
    if progress <= start:
        return 0.0
    return SCHEDULES[name]((progress - start) / (stop - start))
