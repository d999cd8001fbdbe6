"""The command line that every benchmark script has, and its tiny stand-in inputs with `--smoke`."""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness import tiny
from harness.inputs import Inputs
from harness.provenance import version_of
from harness.results import FOLDER, Results, load
from hf_slim.workflows.verbosity import quiet_libraries


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have.

    Args:
        doc: The script's docstring, its help text.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results (default: the committed)")
    parser.add_argument("--again", action="store_true", help="measure rows once more that an earlier run has")
    parser.add_argument("--smoke", action="store_true", help="run all code on tiny models, in a temporary folder")
    return parser


class Run:
    """What a script is run with.

    Attributes:
        options: The parsed command line; with `--smoke`, some are replaced.
        inputs: Models and data.
        scratch: Folder for what is not a result, such as trained models; kept between runs without `--smoke`.
    """

    def __init__(self, options: argparse.Namespace, inputs: Inputs, scratch: Path):
        self.options, self.inputs, self.scratch = options, inputs, scratch

    def results(
        self, name: str, settings: dict[str, Any], seeds: Iterable[int] = (), peers: Iterable[str] = ()
    ) -> Results:
        """The file `<name>.json`; arguments as in `Results`."""
        return Results(self.options.results / f"{name}.json", settings, seeds, peers, self.options.again)

    def has_peer(self, package: str) -> bool:
        """Whether a package to compare with is installed; says so where a smoke run goes on without it.

        Raises: SystemExit: if it is not installed and this is a real run.
        """
        if version_of(package):
            return True
        if not self.options.smoke:
            raise SystemExit(f"{package} is not installed. Run `pip install -e '.[peers]'`, or leave its rows out.")
        print(f"{package} is not installed: its rows are left out.", flush=True)
        return False


def run_script(
    parser: argparse.ArgumentParser, main: Callable[[Run], None], smoke: dict[str, Any] | None = None
) -> None:
    """Parses the command line and calls `main`.

    Args:
        smoke: Options that `--smoke` replaces, by name.
    """
    options = parser.parse_args()
    quiet_libraries()
    if not options.smoke:
        main(Run(options, Inputs(), Path("runs", "benchmarks")))
        return
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as name:
        folder = Path(name)
        vars(options).update(smoke or {}, results=folder / "results")
        os.environ["HF_SLIM_DATA"] = str(tiny.save_data(folder / "data"))
        main(Run(options, tiny.inputs(folder), folder / "scratch"))
        rows = sum(len(load(path)["rows"]) for path in options.results.glob("*.json"))
        print(f"Smoke run: {rows} rows of results in {len(list(options.results.glob('*.json')))} files.")
