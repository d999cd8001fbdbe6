"""Adds values of callbacks to the Trainer's log."""

from typing import Any, Protocol


class HasLogHistory(Protocol):
    """The part of `transformers.TrainerState` that this file needs."""

    log_history: list[dict[str, Any]]


def add_to_logs(state: HasLogHistory, logs: dict[str, Any], values: dict[str, Any]) -> None:
    """Adds `values` to the log entry of an `on_log` event, for progress bars, reporters and the history.

    Args:
        state: The Trainer's state, which holds a copy of `logs` that was made before the event.
        logs: The `logs` argument of `on_log`, which later callbacks read.
    """
    logs.update(values)
    state.log_history[-1].update(values)
