"""The one table of techniques: a fourth technique is a config, a callback and one row."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch import nn
from transformers import TrainerCallback

from hf_slim import PruningCallback, QuantizationCallback, convert, prepare
from hf_slim.core.lifecycle import begin_run, finish_run
from hf_slim.core.record import is_prepared
from hf_slim.integration.techniques import LIFECYCLE, TECHNIQUES, callbacks_for
from hf_slim.integration.trainer import log_before_reporters_
from tests import tiny

ROOT = Path(__file__).parents[2]
NOISE = """
from dataclasses import dataclass
from transformers import TrainerCallback
from hf_slim.core.config import SlimConfig
from hf_slim.core.running.logs import add_to_logs
from hf_slim.integration import techniques
from hf_slim.integration.previews import Preview

@dataclass(frozen=True)
class NoiseConfig(SlimConfig):
    amount: float = 0.1

class NoiseCallback(TrainerCallback):
    def __init__(self, config):
        self.config = config

    def on_log(self, args, state, control, logs, **kwargs):
        add_to_logs(state, logs, {"noise": self.config.amount})

def preview(model, config, inputs):
    return Preview({"lm_head": f"noise {config.amount}"}, lines=("noise       everywhere",))

techniques.TECHNIQUES += (techniques.Row("noise", NoiseConfig, NoiseCallback, preview),)
"""
RUN = """
import sys
import noise
from hf_slim.recipe import load_recipe
from hf_slim.workflows.plan import describe_recipe
from hf_slim.workflows.train import run

if __name__ == "__main__":
    recipe = load_recipe(sys.argv[1])
    plan = describe_recipe(recipe)
    assert "noise       everywhere" in plan and "noise 0.5" in plan, plan
    report = run(recipe)
    assert report["recipe"]["noise"] == {"amount": 0.5}
    assert any(entry.get("noise") == 0.5 for entry in report["training_log"]), report.keys()
    assert "step_ms" in report["result"]["training"]
"""


@pytest.mark.slow
def test_a_fourth_technique_is_one_row(tmp_path):
    tiny.save_base(tmp_path / "base")
    lines = [f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * 9 for i in range(40)]
    (tmp_path / "data.txt").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(
        textwrap.dedent(f"""\
        model: {tmp_path / "base"}
        output: {tmp_path / "out"}
        data: {{source: {tmp_path / "data.txt"}, block_size: 16}}
        training: {{max_steps: 2, per_device_train_batch_size: 2, use_cpu: true, logging_steps: 1}}
        noise: {{amount: 0.5}}
        evaluation: {{blocks: 2, prefill_tokens: 8, decode_tokens: 2, repeats: 2, training_repeats: 2, prompt: "a"}}
        """)
    )
    (tmp_path / "noise.py").write_text(NOISE)
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run(
        [sys.executable, "run.py", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_callbacks_come_in_the_order_of_the_table():
    made = callbacks_for([tiny.QUANTIZATION, tiny.PRUNING, tiny.DISTILLATION])
    assert [type(callback) for callback in made] == [row.callback for row in TECHNIQUES]
    assert {technique.name for technique in LIFECYCLE.techniques} == {"pruning", "quantization"}


@pytest.mark.parametrize("first", ["pruning", "quantization"])
def test_a_model_is_converted_once_all_techniques_of_the_run_are_done(first):
    model, run = tiny.llama(), object()
    prepare(model, tiny.QUANTIZATION)
    for technique in ("pruning", "quantization"):
        begin_run(model, technique, run)
    finish_run(model, first)
    assert is_prepared(model)
    finish_run(model, "quantization" if first == "pruning" else "pruning")
    assert not is_prepared(model)


def test_a_run_that_was_given_up_does_not_hold_the_next_one_back():
    model = tiny.llama()
    prepare(model, tiny.QUANTIZATION)
    begin_run(model, "pruning", object())  # never finished
    begin_run(model, "quantization", object())
    finish_run(model, "quantization")
    assert not is_prepared(model)


class Reporter(TrainerCallback):
    """Takes the log when its turn comes, as TensorBoard's and W&B's do."""

    def __init__(self):
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_reporters_receive_what_callbacks_log(tmp_path):
    reporter = Reporter()
    callbacks = [PruningCallback(tiny.PRUNING), QuantizationCallback(tiny.QUANTIZATION)]
    trainer = tiny.trainer(tiny.llama(), tmp_path, [reporter, *callbacks], logging_steps=2, max_steps=8)
    log_before_reporters_(trainer).train()
    training = [logs for logs in reporter.seen if "loss" in logs]
    assert len(training) == 4
    for logs, entry in zip(training, [e for e in trainer.state.log_history if "loss" in e], strict=True):
        assert {"sparsity", "groups_removed", "bits", "share_on_grid"} <= logs.keys() & entry.keys()
    assert 0 < training[-1]["sparsity"] < 1
    assert training[-1]["groups_removed"] > training[0]["groups_removed"] >= 0


class Scheme(nn.Linear):
    """A stranger's layer that happens to have the same attribute names as ours."""

    scheme = "theirs"

    def plain(self) -> str:
        return "theirs as well"


def test_a_strangers_layer_with_our_attribute_names_is_not_taken_for_ours():
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj = Scheme(48, 64, bias=False)
    convert(prepare(model, tiny.QUANTIZATION))
    assert not is_prepared(model)
