"""What a measured number belongs to: the command, the machine, the versions and the commit."""

import datetime
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_slim.version import __version__
from hf_slim.workflows.report import environment

ROOT = Path(__file__).parents[3]
MEASURED_CODE = ("hf_slim", "recipes", ":!recipes/benchmarks/results")  # a change elsewhere does not move a number


def record_of_run(seeds: Sequence[int], peers: Sequence[str]) -> dict[str, Any]:
    """The record of this process: `command`, `date`, `commit`, `machine`, `versions` and `seeds`.

    Args:
        peers: Names of the packages that hf_slim is compared with; those that are not installed are left out.
    """
    found = environment()
    machine = {key: found[key] for key in ("processor", "accelerator")}
    return {
        "command": command(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine | {"cores": os.cpu_count(), "threads": int(found["threads"])},
        "versions": {key: found[key] for key in ("python", "torch", "transformers")}
        | {"hf_slim": __version__}
        | {peer: version for peer in peers if (version := version_of(peer))},
        "seeds": list(seeds),
    }


def command(arguments: Sequence[str]) -> str:
    """The command line to run again, with the script's path in this repository and without this machine's folders."""
    script, *given = arguments
    shown = [Path(script).resolve().relative_to(ROOT).as_posix()]
    arguments_left = iter(given)
    for argument in arguments_left:
        if argument == "--results":
            next(arguments_left, None)
        elif not argument.startswith("--results="):
            shown.append(Path(argument).name if os.path.isabs(argument) else argument)
    return shlex.join(["python", *shown])


def commit() -> str:
    """The commit that is checked out, 12 digits; "with changes" where measured code differs from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return f"{head} with changes" if _git("status", "--porcelain", "--", *MEASURED_CODE) else head


def version_of(package: str) -> str | None:
    """The installed version; None if the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
