"""Checks the tests: puts small faults into the arithmetic, one at a time, and counts how many its own tests notice.

    python -m tests.mutants [--only criteria | pruning/importance/criteria.py] [--count 200] [--seed 0] [--jobs 1]

Libraries are imported once. Every mutant then gets a forked process, which imports hf_slim with the fault and runs the
test files of the fault's room. `make mutants` fails where fewer than `LEAST_NOTICED` of the mutants make a test fail.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest

from tests.mutant_rooms import EQUIVALENT, FAULTS, ROOMS, Room
from tests.mutations import Mutant, mutants_of, written_mutant

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_slim"
LEAST_NOTICED = 0.9
NEVER_IMPORTED = 99  # exit status of a child whose tests passed without the mutated file
POLL_S = 0.02


class MutantFinder:
    """Finds one module before anyone else does, and runs a source of ours in the place of its file."""

    def __init__(self, module: str, source: str, path: Path):
        self.module, self.source, self.path, self.found = module, source, path, False

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        self.found = True
        return importlib.util.spec_from_file_location(name, self.path, loader=_Loader(name, str(self.path), self))


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, finder: MutantFinder):
        super().__init__(name, path)
        self.finder = finder

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.finder.source, str(self.finder.path), "exec")


@dataclass
class Child:
    """A forked process that runs tests.

    Attributes:
        mutant: What is wrong in it; None: nothing.
        deadline: `time.monotonic()` after which it is stopped; a test that hangs has noticed its mutant.
    """

    pid: int
    mutant: Mutant | None
    deadline: float
    room: str

    def status(self) -> int | None:
        """What pytest said; None while it runs, -1 where the process was stopped or crashed."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if not ended and time.monotonic() > self.deadline:
            os.killpg(self.pid, signal.SIGKILL)
            ended, status = os.waitpid(self.pid, 0)
        return None if not ended else os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1


def run_tests(room: Room, mutant: Mutant | None, scratch: Path, loaded: Path | None = None) -> int:
    """pytest's exit status for the tests of a room, in this process.

    Args:
        loaded: Gets the names of all modules that are imported then, as JSON.
    """
    finder = None
    if mutant is not None:
        module = "hf_slim." + mutant.path.removesuffix(".py").replace("/", ".")
        finder = MutantFinder(module, mutant.source, PACKAGE / mutant.path)
        sys.meta_path.insert(0, finder)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"--basetemp={scratch / str(os.getpid())}"]
    status = pytest.main([*options, "--hypothesis-seed=0", *(str(ROOT / test) for test in room.tests)])
    if loaded is not None:
        loaded.write_text(json.dumps(list(sys.modules)))
    if finder is not None and status == pytest.ExitCode.OK and not finder.found:
        return NEVER_IMPORTED
    return int(status)


def fork(work: Callable[[], int], output: Path) -> int:
    """Process id of a child that does `work`, writes to the file `output`, and exits with what `work` returns."""
    sys.stdout.flush()
    with warnings.catch_warnings():  # the libraries have started threads, which the child does not use
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = -1
    try:
        os.setpgid(0, 0)
        handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        status = work()
    finally:
        os._exit(status if 0 <= status < 128 else 127)


def start(name: str, mutant: Mutant | None, limit_s: float, scratch: Path) -> Child:
    """A child that runs the tests of a room."""
    room = ROOMS[name]
    loaded = scratch / "modules.json" if mutant is None else None
    pid = fork(lambda: run_tests(room, mutant, scratch, loaded), scratch / f"{name}.log")
    return Child(pid, mutant, time.monotonic() + limit_s, name)


def wait(child: Child) -> int:
    """Its exit status."""
    while (status := child.status()) is None:
        time.sleep(POLL_S)
    return status


def warm_up(name: str, scratch: Path) -> float:
    """Seconds that the tests of a room take without a fault; imports the libraries that they have imported.

    Raises: SystemExit: if they fail.
    """
    for _ in range(2):  # the first time libraries are imported
        begin = time.monotonic()
        if wait(start(name, None, 600, scratch)) != pytest.ExitCode.OK:
            sys.exit(f"The tests of {name} fail without any fault:\n{(scratch / f'{name}.log').read_text()}")
        seconds = time.monotonic() - begin
        for module in json.loads((scratch / "modules.json").read_text()):
            if module.split(".")[0] not in ("hf_slim", "tests", "__main__", "__mp_main__", "conftest"):
                with contextlib.suppress(Exception):  # some are made by hand, and no file has their name
                    importlib.import_module(module)
    gc.freeze()
    return seconds


def drawn(rooms: Sequence[str], count: int, seed: int, only: str | None = None) -> list[tuple[str, Mutant]]:
    """`count` mutants with their rooms, spread evenly over the rooms and drawn at random within each; 0: all."""
    found = {name: mutants_in(ROOMS[name], only) for name in rooms}
    for mutants in found.values():
        random.Random(seed).shuffle(mutants)
    shares = dict.fromkeys(rooms, 0)
    total = sum(map(len, found.values()))
    for _ in range(min(count, total) if count else total):
        poorest = min((name for name in rooms if shares[name] < len(found[name])), key=shares.__getitem__)
        shares[poorest] += 1
    return [(name, mutant) for name in rooms for mutant in found[name][: shares[name]]]


def mutants_in(room: Room, only: str | None = None) -> list[Mutant]:
    """All mutants of the files of a room, but for those that change nothing which can be observed."""
    return [
        mutant
        for path, functions in room.files.items()
        if only in (None, path)
        for mutant in mutants_of((PACKAGE / path).read_text(), path, functions)
        if not is_equivalent(mutant)
    ]


def is_equivalent(mutant: Mutant) -> bool:
    """Whether a mutant is on the list of those that change nothing observable."""
    return any(
        mutant.path == path and mutant.before == before and after in (None, mutant.after)
        for path, before, after, _ in EQUIVALENT
    )


def faults(rooms: Sequence[str]) -> list[tuple[str, Mutant]]:
    """The faults that were found by hand, with their rooms."""
    chosen = [fault for fault in FAULTS if fault.room in rooms]
    return [(f.room, written_mutant((PACKAGE / f.path).read_text(), f.path, f.pattern, f.change)) for f in chosen]


def examined(chosen: list[tuple[str, Mutant]], seconds: dict[str, float], jobs: int, scratch: Path) -> Iterator[tuple]:
    """(room, mutant, exit status) of every mutant, as they end."""
    waiting, running = list(reversed(chosen)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            name, mutant = waiting.pop()
            running.append(start(name, mutant, 10 + 5 * seconds[name], scratch))
        for child in list(running):
            if (status := child.status()) is not None:
                running.remove(child)
                yield child.room, child.mutant, status
        time.sleep(POLL_S)


def notices(status: int) -> bool:
    """Whether an exit status means that a test failed, could not be collected, crashed or never ended.

    Without the fault all tests of the room pass, see `warm_up`: whatever else happens is the fault's doing.
    """
    return status not in (pytest.ExitCode.OK, NEVER_IMPORTED)


def table(results: list[tuple[str, Mutant, int]]) -> str:
    """A row for each file, and every mutant that no test noticed."""
    lines = [f"{'file':<44} {'mutants':>8} {'noticed':>8}"]
    for path in dict.fromkeys(mutant.path for _, mutant, _ in results):
        statuses = [status for _, mutant, status in results if mutant.path == path]
        lines.append(f"{path:<44} {len(statuses):>8} {sum(map(notices, statuses)):>8}")
    for _, mutant, status in results:
        if not notices(status):
            why = "   (its tests never import this file)" if status == NEVER_IMPORTED else ""
            lines.append(f"survived: {mutant.path}:{mutant.line}{why}\n    - {mutant.before}\n    + {mutant.after}")
    return "\n".join(lines)


def main() -> int:
    """The command; returns 1 where too few mutants are noticed, or one of `FAULTS` is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a room, or one of its files")
    parser.add_argument("--count", type=int, default=200, help="mutants in all; 0: every one")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    args = parser.parse_args()
    rooms = [name for name, room in ROOMS.items() if args.only in (None, name, *room.files)]
    if not rooms:
        parser.error(f"no room and no file is called {args.only}; rooms are {', '.join(ROOMS)}")
    file = None if args.only in (None, *ROOMS) else args.only
    known, chosen = faults(rooms), drawn(rooms, args.count, args.seed, file)
    known = [(room, mutant) for room, mutant in known if file in (None, mutant.path)]
    results: dict[bool, list] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ |= {"HYPOTHESIS_STORAGE_DIRECTORY": folder, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        seconds = {name: warm_up(name, scratch) for name in rooms}
        print("seconds of the tests:", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()), flush=True)
        for is_known, part in ((True, known), (False, chosen)):
            for result in examined(part, seconds, args.jobs, scratch):
                results[is_known].append(result)
                print("." if notices(result[2]) else "S", end="", flush=True)
    print(f"\n\n{table(results[False])}\n\nfaults found by hand\n{table(results[True])}")
    share = sum(notices(status) for *_, status in results[False]) / max(1, len(results[False]))
    print(f"\n{share:.1%} of {len(results[False])} mutants were noticed; at least {LEAST_NOTICED:.0%} must be.")
    return int(share < LEAST_NOTICED or not all(notices(status) for *_, status in results[True]))


if __name__ == "__main__":
    sys.exit(main())
