"""The mutation check itself: faults are made, a forked process runs them, and the rooms name what exists."""

import ast
import importlib
import os
import sys
import time

import pytest

from tests.mutant_rooms import EQUIVALENT, FAULTS, ROOMS
from tests.mutants import PACKAGE, ROOT, Child, MutantFinder, fork, mutants_in, wait
from tests.mutations import mutants_of, written_mutant

SOURCE = "def least(a, b):\n    if a < b and b:\n        return a + 1\n    return b\n"


def changed_lines(source: str, **settings) -> set[str]:
    return {mutant.after for mutant in mutants_of(source, "file.py", **settings)}


def test_comparisons_sums_constants_and_conditions_change():
    found = changed_lines(SOURCE)
    assert {"if a <= b and b:", "if a >= b and b:", "if a < b or b:", "if a < b:", "if b:"} <= found
    assert {"return a - 1", "return a + 2", "return a", "return 1"} <= found


def test_what_writes_in_place_is_left_out_and_slices_are_off_by_one():
    found = changed_lines("def f(x):\n    x.add_(y)\n    x[0] = 2\n    return max(x[1:n])\n")
    assert {"pass", "return min(x[1:n])", "return max(x[1 + 1:n])", "return max(x[1:n - 1])"} <= found


def test_mutants_are_the_same_every_time_and_differ_from_each_other():
    first, again = (mutants_of(SOURCE, "file.py") for _ in range(2))
    assert first == again
    sources = [mutant.source for mutant in first]
    assert len(set(sources)) == len(sources)
    assert ast.unparse(ast.parse(SOURCE)) not in sources


def test_faults_may_be_kept_to_some_functions():
    source = SOURCE + "def other(a):\n    return a * 3\n"
    assert changed_lines(source, functions=("other",)) == {"return a / 3", "return a * 4", "return a", "return 3"}
    with pytest.raises(LookupError, match="no function gone"):
        mutants_of(source, "file.py", ("gone",))


def test_a_fault_by_pattern_needs_exactly_one_place():
    assert written_mutant(SOURCE, "file.py", r"a \+ 1", "a").after == "return a"
    for pattern in ("nothing", "return"):
        with pytest.raises(LookupError, match="expected one"):
            written_mutant(SOURCE, "file.py", pattern, "")


def test_a_forked_process_imports_the_fault_and_this_one_does_not(tmp_path, monkeypatch):
    path = tmp_path / "module_with_a_fault.py"
    path.write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)

    def work() -> int:
        sys.meta_path.insert(0, MutantFinder("module_with_a_fault", "VALUE = 4\n", path))
        return importlib.import_module("module_with_a_fault").VALUE

    child = Child(fork(work, tmp_path / "output"), None, time.monotonic() + 60, "room")
    assert wait(child) == 4
    assert importlib.import_module("module_with_a_fault").VALUE == 3


def test_a_process_that_hangs_is_stopped(tmp_path):
    child = Child(fork(lambda: time.sleep(60) or 0, tmp_path / "output"), None, time.monotonic() + 0.2, "room")
    assert wait(child) == -1
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, 0)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_has_faults_and_tests(name):
    assert mutants_in(ROOMS[name])
    assert all((ROOT / test).is_file() for test in ROOMS[name].tests)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_a_fault_that_was_found_by_hand_still_has_its_place(fault):
    source = (PACKAGE / fault.path).read_text()
    assert written_mutant(source, fault.path, fault.pattern, fault.change).source != ast.unparse(ast.parse(source))


def test_every_change_that_nobody_can_notice_is_still_one_that_is_made():
    files = {path: functions for room in ROOMS.values() for path, functions in room.files.items()}
    for path in {path for path, *_ in EQUIVALENT}:
        made = {(m.before, m.after) for m in mutants_of((PACKAGE / path).read_text(), path, files[path])}
        for _, before, after, _ in (entry for entry in EQUIVALENT if entry[0] == path):
            assert any(old == before and after in (None, new) for old, new in made), before
