"""Results of a benchmark by name, kept in a file, so that an interrupted run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_slim.core.report import write_atomically


class Cells:
    """Results by name, written to a file as they come."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.found = json.loads(path.read_text()) if path.exists() else {"settings": settings}
        if self.found["settings"] != settings:
            raise SystemExit(f"{path} holds a run with {self.found['settings']}. Give --results, or delete it.")
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The cell of that name, measured unless an earlier run has it."""
        if name not in self.found:
            self.found[name] = measure()
            print(name, {key: round(value, 4) for key, value in self.found[name].items()}, flush=True)
            write_atomically(self.path, lambda path: path.write_text(json.dumps(self.found, indent=2) + "\n"))
        return self.found[name]
