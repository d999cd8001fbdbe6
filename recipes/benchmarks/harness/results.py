"""Results of a benchmark: one JSON file of named rows, each with the record of the run that measured it.

`{"schema_version", "name", "settings", "runs": [record], "rows": {name: {"run": index, "values": {measure: value}}}}`.
A value is a number, a text that says why there is none, or `{"median", "low", "high", "samples"}` of repetitions.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness.provenance import record_of_run
from hf_slim.core.report import write_atomically

SCHEMA_VERSION = 1
FOLDER = Path(__file__).parents[1] / "results"
Values = dict[str, Any]


class Results:
    """Rows of one benchmark, written to a file as they come, so that an interrupted run goes on.

    Args:
        settings: What every row of the file has in common; a file with other settings is refused.
        seeds: Of this run.
        peers: Packages whose versions are recorded.
        again: Whether rows that an earlier run has are measured once more.
    """

    def __init__(
        self, path: Path, settings: Values, seeds: Iterable[int] = (), peers: Iterable[str] = (), again: bool = False
    ):
        self.path, self.again = path, again
        self.run = record_of_run(list(seeds), list(peers))  # now: what is checked out may change while a run goes on
        self.measured_now: set[str] = set()
        settings = json.loads(json.dumps(settings))  # as it reads from a file: a tuple is a list
        self.content = load(path) if path.exists() else _empty(path.stem, settings)
        if self.content["settings"] != settings:
            raise SystemExit(
                f"{path} holds results of other settings: {self.content['settings']}; this run has {settings}. "
                "Give --results another folder, or delete the file."
            )
        path.parent.mkdir(parents=True, exist_ok=True)

    def values(self) -> dict[str, Values]:
        """Row name -> measures."""
        return values_of(self.content)

    def __call__(self, name: str, measure: Callable[[], Values]) -> Values:
        """The row of that name; measured unless an earlier run has it."""
        return self.together([name], lambda: {name: measure()})[name]

    def together(self, names: Iterable[str], measure: Callable[[], dict[str, Values]]) -> dict[str, Values]:
        """Rows that are measured together, such as timings taken in turn; none of them if the file has all."""
        names = list(names)
        if self.misses(names):
            found = measure()
            if set(found) != set(names):
                raise ValueError(f"Measured the rows {sorted(found)}, expected {sorted(names)}.")
            self._keep(found)
        return {name: self.values()[name] for name in names}

    def misses(self, names: Iterable[str]) -> bool:
        """Whether a row of these has to be measured."""
        names = list(names)
        missing = [name for name in names if name not in self.content["rows"]]
        return bool(missing) or (self.again and not self.measured_now.issuperset(names))

    def _keep(self, found: dict[str, Values]) -> None:
        runs = [*(run for run in self.content["runs"] if run is not self.run), self.run]
        records = {name: runs[row["run"]] for name, row in self.content["rows"].items()}
        rows = {name: row["values"] for name, row in self.content["rows"].items()} | found
        records |= dict.fromkeys(found, self.run)
        used = [run for run in runs if any(record is run for record in records.values())]
        index = {id(run): place for place, run in enumerate(used)}
        self.content["runs"] = used
        self.content["rows"] = {name: {"run": index[id(records[name])], "values": rows[name]} for name in rows}
        self.measured_now |= found.keys()
        write_atomically(self.path, lambda path: path.write_text(json.dumps(self.content, indent=1) + "\n"))
        for name, values in found.items():
            print(f"{name}: {_shown(values)}", flush=True)


def load(path: Path) -> dict[str, Any]:
    """The content of a results file.

    Raises: ValueError: if another version of this project wrote it.
    """
    content = json.loads(path.read_text())
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has version {content.get('schema_version')}, this code reads {SCHEMA_VERSION}.")
    return content


def values_of(content: dict[str, Any]) -> dict[str, Values]:
    """Row name -> measures of a loaded file."""
    return {name: row["values"] for name, row in content["rows"].items()}


def _empty(name: str, settings: Values) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "name": name, "settings": settings, "runs": [], "rows": {}}


def _shown(values: Values) -> str:
    """The numbers for a terminal: the median of a spread; what is nested deeper is left to the file."""
    shown = []
    for key, value in values.items():
        value = value.get("median") if isinstance(value, dict) else value
        if value is not None:
            shown.append(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(shown)
