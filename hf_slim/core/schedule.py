"""Schedules: the share of a gradual change that is due, as a function of training progress."""

from collections.abc import Callable

from hf_slim.core.registry import Registry

Schedule = Callable[[float, int], float]  # (fraction of the way from start to stop, rounds) -> share that is due
SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("linear")
def linear(fraction: float, rounds: int) -> float:
    """The same amount in every step."""
    return fraction


@SCHEDULES.register("cubic")
def cubic(fraction: float, rounds: int) -> float:
    """Large steps first, small ones at the end, so that the model can recover.

    Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1.
    """
    return 1 - (1 - fraction) ** 3


@SCHEDULES.register("one_shot")
def one_shot(fraction: float, rounds: int) -> float:
    """The whole amount at the stop, nothing before."""
    return float(fraction >= 1)


@SCHEDULES.register("staged")
def staged(fraction: float, rounds: int) -> float:
    """Equal steps with time to recover between them; the first at the start, the last at the stop.

    Source: Han et al. 2015, arXiv:1506.02626, sec. 3.4: prune, retrain, repeat.
    """
    return min(1.0, (1 + int(fraction * (rounds - 1))) / rounds)


def scheduled(name: str, progress: float, start: float, stop: float, rounds: int) -> float:
    """Share of the final amount that is due now, in [0, 1].

    Args:
        name: A registered schedule.
        progress: Share of training that is done, in [0, 1].
        start: Progress up to which nothing happens.
        stop: Progress from which the whole amount is due; not below `start`.
        rounds: Number of steps of a schedule with steps, at least 2.
    """
    if progress >= stop:
        return 1.0
    if progress <= start:
        return 0.0
    return SCHEDULES[name]((progress - start) / (stop - start), rounds)
