"""What callbacks add to the Trainer's log."""

from typing import Any, Protocol


class HasLogHistory(Protocol):
    """The part of `transformers.TrainerState` that is needed here."""

    log_history: list[dict[str, Any]]


def add_to_logs(state: HasLogHistory, logs: dict[str, Any], values: dict[str, Any]) -> None:
    """Adds `values` to the log entry that an `on_log` event is about: for progress bars, reporters and the history.

    Args:
        state: The Trainer's state, which holds a copy of `logs` that was made before the event.
        logs: What `on_log` was given; callbacks that come later read it.
    """
    logs.update(values)
    state.log_history[-1].update(values)
