"""What distillation costs: a training step with a teacher against TRL's GKD and against a plain step, and memory.

A Llama of 15 M parameters learns from one of 48 M, vocabulary 49152, 4 x 256 tokens, on the CPU in float32. All sides
take turns in one process; ours computes the task loss as well. Peaks of memory come from fresh processes and count
what a run takes beyond the loaded models. TRL's trainer wants chats and a tokenizer, so its own `compute_loss` runs in
a plain Trainer on the same batch; its dataset code is not measured. The last part trains half of SmolLM2 with a
teacher in memory and with the same teacher stored, and writes a file of its own, `distillation_stored.json`.

    python recipes/benchmarks/distillation_speed.py                     # needs trl; a quarter of an hour on 2 cores
    python recipes/benchmarks/distillation_speed.py --parts speed       # without the training of half of SmolLM2
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness.command import Run, parser_of, run_script
from harness.distillation_sides import (
    SIZES,
    SMOKE_SIZES,
    Sizes,
    blocks,
    gkd,
    ours,
    plain,
    store_answers,
    stored,
    teacher,
)
from harness.inputs import Inputs
from harness.results import Values
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers import default_data_collator as collate

from hf_slim import DistillationCallback, StudentShape, make_student
from hf_slim.data import load_texts, text_blocks
from hf_slim.distillation.teachers.live import freeze_
from hf_slim.evaluation.footprint import peak_rss_bytes
from hf_slim.evaluation.latency import interleaved_ms, spread
from hf_slim.evaluation.quality import perplexity
from hf_slim.evaluation.training_speed import Stepper
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.workflows.evaluate import in_fresh_process

SEED = 42
STUDENT_ALPHA = 0.7
HELD_OUT_BLOCKS = 32
# name -> our losses, TRL's beta for the same divergence
DIVERGENCES = {"forward KL": ("forward_kl", 0.0), "Jensen-Shannon": ("jensen_shannon", 0.5)}


def speed(divergence: str, sizes: Sizes, repeats: int, with_trl: bool) -> Values:
    """Milliseconds of a step of every side, and bytes that two steps take beyond the loaded models."""
    losses, beta = DIVERGENCES[divergence]
    with tempfile.TemporaryDirectory() as folder:
        batch = collate(list(blocks(sizes)))
        trainers = {"plain": plain(folder, sizes), "hf_slim": ours(folder, sizes, losses),
                    "stored": stored(folder, sizes, losses)}  # fmt: skip
        trainers |= {"trl_gkd": gkd(folder, sizes, beta)} if with_trl else {}
        sides: dict[str, Callable[[], object]] = {
            name: Stepper.around(trainer, batch).step for name, trainer in trainers.items()
        }
        model = teacher(sizes)
        sides["teacher"] = lambda: forward(model, batch)
        taken = {f"{side}_ms": spread(ms) for side, ms in interleaved_ms(sides, repeats, divergence).items()}
    compared = ("hf_slim", "trl_gkd") if with_trl else ("hf_slim",)
    return taken | {f"{side}_peak_bytes": peaks(side, sizes, divergence) for side in compared}


@torch.no_grad()
def forward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """The teacher's part of a step."""
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def peaks(side: str, sizes: Sizes, divergence: str, repeats: int = 3) -> Values:
    """Of fresh processes, each bytes that two training steps take beyond the loaded models."""
    return spread([in_fresh_process(_peak, side, sizes, divergence) for _ in range(repeats if sizes is SIZES else 1)])


def _peak(side: str, sizes: Sizes, divergence: str) -> int:
    losses, beta = DIVERGENCES[divergence]
    with tempfile.TemporaryDirectory() as folder:
        trainer = ours(folder, sizes, losses) if side == "hf_slim" else gkd(folder, sizes, beta)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
        before = peak_rss_bytes()
        trainer.train()
        return peak_rss_bytes() - before


class Stored:
    """Half of SmolLM2 after the same run without a teacher, with one in memory and with the same one stored."""

    def __init__(self, inputs: Inputs, sizes: Sizes, steps: int):
        data, tokenizer = inputs.texts, load_tokenizer(inputs.causal)
        data = type(data)(data.source, block_size=sizes.length)
        counts = (steps * sizes.rows, HELD_OUT_BLOCKS)
        self.train, self.held_out = (
            text_blocks(texts, tokenizer, data, count, SEED, "reading text")
            for texts, count in zip(load_texts(data), counts, strict=True)
        )
        self.teacher, self.sizes, self.steps = freeze_(load_model(inputs.causal)), sizes, steps

    def rows(self) -> dict[str, Values]:
        """Perplexity by the student's teacher."""
        with tempfile.TemporaryDirectory() as folder:
            store_answers(self.teacher, [self.train], Path(folder) / "store", self.sizes, torch.bfloat16)
            callbacks = {
                "none": [],
                "live": [DistillationCallback({"alpha": STUDENT_ALPHA}, teacher=self.teacher)],
                "stored": [DistillationCallback({"alpha": STUDENT_ALPHA, "teacher": f"{folder}/store"})],
            }
            return {f"teacher {name}": self._trained(folder, given) for name, given in callbacks.items()}

    def _trained(self, folder: str, callbacks: list[DistillationCallback]) -> Values:
        made = make_student(self.teacher, StudentShape(keep=0.5))
        args = TrainingArguments(
            folder, max_steps=self.steps, bf16=True, report_to="none", seed=SEED, learning_rate=1e-4, use_cpu=True,
            per_device_train_batch_size=self.sizes.rows, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        Trainer(made, args, train_dataset=self.train, callbacks=callbacks).train()
        return {"perplexity": perplexity(made, self.held_out)}


def main(run: Run) -> None:
    """Measures the parts that the command line selects."""
    options = run.options
    sizes = SMOKE_SIZES if options.smoke else SIZES
    if "speed" in options.parts:
        with_trl = run.has_peer("trl")
        results = run.results("distillation_speed", {"sizes": sizes.as_dict()}, [0], ["trl"])
        for name in options.divergences:
            results(name, lambda name=name: speed(name, sizes, options.repeats, with_trl))
    if "stored" in options.parts:
        names = ["teacher none", "teacher live", "teacher stored"]
        settings = {"model": "SmolLM2-135M-Instruct", "student_layers": 0.5, "alpha": STUDENT_ALPHA}
        settings |= {"steps": options.steps, "rows": sizes.rows, "block_size": sizes.length}
        results = run.results("distillation_stored", settings, [SEED])
        results.together(names, lambda: Stored(run.inputs, sizes, options.steps).rows())


PARTS = ("speed", "stored")

if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=100, help="of the run with a stored teacher (default: 100)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--divergences", nargs="+", default=list(DIVERGENCES), choices=list(DIVERGENCES))
    run_script(parser, main, smoke={"repeats": 1, "steps": 2, "divergences": ["forward KL"]})
