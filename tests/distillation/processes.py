"""A function of a test module, run in one or several processes that talk over gloo."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LAUNCHER = "import sys; from {module} import {name}; {name}(sys.argv[1])"


def in_processes(function: Callable[[str], None], folder: Path, processes: int) -> Any:
    """What `function(folder)` has saved as `found.pt`.

    Args:
        processes: 1 for a plain run without any process group.
    """
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(LAUNCHER.format(module=function.__module__, name=function.__name__))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt")


def place() -> tuple[int, int]:
    """How many processes there are, and which one this is."""
    torch.set_num_threads(1)
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
