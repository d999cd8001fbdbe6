"""What a teacher adds: students of some layers, trained with it, without it, and by TRL's GKD.

MiniLM-L6 with two or three of its six layers on SST-2 and BANKING77 (accuracy), SmolLM2-135M with half of its thirty
on TinyStories (held-out perplexity). The teacher is fine-tuned on the task first, once. A classifier's student is cut
from MiniLM as it is published, with a new head, so that without a teacher it knows nothing of the teacher's training;
SmolLM2's is cut from the fine-tuned teacher. Both sides then get the same steps, rate and data, in an order that the
seed gives. GKD learns from the data alone (`lmbda=0`), else with TRL's defaults; it is for language models only.

    python recipes/benchmarks/distillation_quality.py           # needs trl for GKD; 90 minutes on one core
    python recipes/benchmarks/distillation_quality.py --tasks banking77 --seeds 0
    python recipes/benchmarks/distillation_quality.py --trial   # settings on training texts that nothing else reads

On such texts the classifiers' rates were chosen, for training alone (one for both students), and then what is
followed: answers alone added nothing on BANKING77, squared differences of hidden states most, with a weight of 200
more than with 10 or 50; for SmolLM2 alpha 0.9 was better than 0.5. The data are read from `$HF_SLIM_DATA`. Finished
rows, and teachers in `runs/benchmarks`, are kept, so that an interrupted run goes on; seeds are done one after the
other. `--trial` writes a file of its own, `distillation_quality_trial.json`.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness.command import Run, parser_of, run_script
from harness.results import Results, Values
from harness.student_tasks import ALONE, CAUSAL, CLASSIFIER, DATA_SEED, GKD, OURS, SCHEDULES, Task, task_of
from transformers import PreTrainedModel, Trainer

from hf_slim import make_student

TRIAL_SEED = 100
SIDES = (ALONE, OURS, GKD)


class Bench:
    """Teachers and students of the tasks."""

    def __init__(self, tasks: list[Task], scale: float, folder: Path):
        self.tasks, self.scale, self.folder = tasks, scale, folder

    def teacher(self, task: Task) -> PreTrainedModel:
        """Fine-tuned on the task, now or in an earlier run; a copy of its own for everyone who asks."""
        folder = self.folder / task.name
        if not (folder / "config.json").exists():
            torch.manual_seed(DATA_SEED)  # the new classifier
            schedule = task.schedule.scaled(self.scale)
            trainer = self._trainer(task, task.load(), (schedule.teacher_steps, schedule.teacher_rate, DATA_SEED))
            trainer.train()
            trainer.save_model(folder)
        return task.load(str(folder))

    def student(self, task: Task, keep: float, side: str, seed: int, steps: int = 0) -> PreTrainedModel:
        """That share of the layers, trained; for as long as the task says, unless `steps` are given."""
        schedule = task.schedule.scaled(self.scale)
        torch.manual_seed(seed)  # the new classifier
        model = make_student(self.teacher(task) if task.from_teacher else task.load(), {"keep": keep})
        teacher = None if side == ALONE else self.teacher(task).requires_grad_(False)
        self._trainer(task, model, (steps or schedule.steps, schedule.learning_rate, seed), side, teacher).train()
        return model

    def _trainer(
        self, task: Task, model: PreTrainedModel, how: tuple[int, float, int], side: str = ALONE,
        teacher: PreTrainedModel | None = None,
    ) -> Trainer:  # fmt: skip
        steps, learning_rate, seed = how
        args = {
            "output_dir": str(self.folder), "max_steps": steps, "learning_rate": learning_rate, "seed": seed,
            "per_device_train_batch_size": task.schedule.batch_size, "lr_scheduler_type": "cosine",
            "warmup_steps": 0.06, "weight_decay": 0.01, "bf16": True, "save_strategy": "no", "logging_steps": 25,
            "report_to": "none", "use_cpu": not torch.cuda.is_available(),
        }  # fmt: skip
        return task.trainer(model, args, side, teacher)

    def rows(self, seeds: Sequence[int], sides: Sequence[str], results: Results) -> None:
        """Fills "sst2, teacher", "sst2, 2 layers, hf_slim, 0", ..."""
        for task in self.tasks:
            results(f"{task.name}, teacher", lambda task=task: task.score(self.teacher(task)))
        for seed, task in itertools.product(seeds, self.tasks):
            for name, side in itertools.product(task.students, task.sides):
                if side not in sides:
                    continue
                how = (task, task.students[name], side, seed)
                results(f"{task.name}, {name}, {side}, {seed}", lambda how=how: self._measured(*how))

    def _measured(self, task: Task, keep: float, side: str, seed: int) -> Values:
        start = time.process_time()
        model = self.student(task, keep, side, seed)
        minutes = (time.process_time() - start) / 60
        return task.score(model) | {"cpu_minutes": minutes}

    def trial(self, results: Results) -> None:
        """Fills "sst2, hidden", ...: the smallest students, briefly trained, on texts that nothing else reads."""
        for task in self.tasks:
            for name, settings in task.candidates.items():
                results(f"{task.name}, {name}", lambda task=task, settings=settings: self._tried(task, settings))

    def _tried(self, task: Task, settings: dict[str, Any] | None) -> Values:
        task.settings, side = settings, OURS if settings else ALONE
        steps = max(1, round(self.scale * task.trial_steps))
        model = self.student(task, next(iter(task.students.values())), side, TRIAL_SEED, steps)
        return task.score(model, task.trial)


def main(run: Run) -> None:
    """Measures what the command line selects."""
    options = run.options
    torch.set_num_threads(1)
    tasks = [task_of(name, run.inputs) for name in options.tasks]
    bench = Bench(tasks, options.scale, run.scratch / "distillation_quality")
    settings = {"scale": options.scale, "schedules": {name: asdict(each) for name, each in SCHEDULES.items()}}
    if options.trial or options.smoke:
        bench.trial(run.results("distillation_quality_trial", settings, [TRIAL_SEED]))
    if not options.trial:
        sides = [side for side in options.sides if side != GKD or run.has_peer("trl")]
        settings |= {"classifier": CLASSIFIER, "causal": CAUSAL}
        bench.rows(options.seeds, sides, run.results("distillation_quality", settings, options.seeds, ["trl"]))


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps (default: 1)")
    parser.add_argument("--trial", action="store_true", help="compare settings of hf_slim")
    run_script(parser, main, smoke={"scale": 0.002, "seeds": [0]})
