"""Two processes train as one: the same groups go, and the weights agree to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
import torch
from hf_slim import DistillationCallback, PruningCallback
from hf_slim.distillation.teachers.live import freeze_
from tests import tiny

torch.set_num_threads(1)
folder, batch = sys.argv[1], int(sys.argv[2])
pruning = PruningCallback(tiny.PRUNING)
callbacks = [DistillationCallback(tiny.DISTILLATION, teacher=freeze_(tiny.llama(seed=7))), pruning]
trainer = tiny.trainer(tiny.llama(), folder, callbacks, tiny.text_data(64, ragged=True),
                       per_device_train_batch_size=batch, learning_rate=1e-3,
                       **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}))
trainer.train()
if int(os.environ.get("RANK", 0)) == 0:
    trainer.save_model(folder + "/small")
print(json.dumps(pruning.run.removed), file=open(f"{folder}/removed-{os.environ.get('RANK', 0)}.json", "w"))
"""


def run(folder: Path, processes: int) -> None:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, str(script), str(folder), str(4 // processes)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run(tmp_path / "one", 1)
    run(tmp_path / "two", 2)
    removed = [json.loads((tmp_path / "two" / f"removed-{rank}.json").read_text()) for rank in (0, 1)]
    assert removed[0]
    assert removed[0] == removed[1]
    assert removed[0] == json.loads((tmp_path / "one" / "removed-0.json").read_text())
    one, two = (load_file(tmp_path / name / "small" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)
