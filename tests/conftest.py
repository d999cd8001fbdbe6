"""What every test shares: quiet libraries, no Hub, real data only where it is."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from tests import families, tiny

torch.set_num_threads(1)  # tiny models: threads would only wait for each other
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


KNOWN_FAMILIES = {*families.FAMILIES, *tiny.ALL_FAMILIES}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family", action="append", help="leave out the cases of all other families; may be repeated")
    parser.addoption("--no-skips", action="store_true", help="fail if a test was skipped, or none was run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--family` no test runs with another family of models than those that it names."""
    asked = set(config.getoption("family") or KNOWN_FAMILIES)
    if unknown := sorted(asked - KNOWN_FAMILIES):
        allowed = ", ".join(sorted(KNOWN_FAMILIES))
        raise pytest.UsageError(f"--family: unknown {', '.join(unknown)}. Allowed: {allowed}")
    others = [item for item in items if _families_of(item) - asked]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


def _families_of(item: pytest.Item) -> set[str]:
    """The families of models among the parameters of a test."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {value for value in values if isinstance(value, str)} & KNOWN_FAMILIES


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With `--no-skips` a run fails whose environment does not have what its tests need."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("no_skips") and reporter is not None:  # a worker of pytest-xdist has no reporter
        skipped, passed = (len(reporter.stats.get(outcome, ())) for outcome in ("skipped", "passed"))
        if skipped or not passed:
            reporter.write_line(f"--no-skips: {passed} tests passed and {skipped} were skipped", red=True)
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real datasets, from the setting HF_SLIM_DATA."""
    folder = Path(os.environ.get("HF_SLIM_DATA", "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"real datasets are not at {folder}: set HF_SLIM_DATA to a folder that holds them")
    return folder
