"""Tables of the three benchmarks of distillation."""

import statistics

from rendering.markdown import MISSING, Rows, measure, median, number, ratio, scaled, table

TRL_DISTILLATION = "TRL `DistillationTrainer`"
TASKS = {"tinystories": ("TinyStories", "perplexity"), "sst2": ("SST-2", "accuracy"),
         "banking77": ("BANKING77", "accuracy")}  # fmt: skip
MIB = 1 / 2**20


def gradients(rows: Rows) -> str:
    """Relative error of the gradient of a cut batch, and the factor by which its length is off."""
    sides = list(dict.fromkeys(name.partition("`, ")[0] + "`" for name in rows))
    cuts = list(dict.fromkeys(name.partition("`, ")[2] for name in rows))
    found = [[side, *(_gradient_cell(rows.get(f"{side}, {cut}", {})) for cut in cuts)] for side in sides]
    return table(["trainer", *(f"{cut} against 1 x 8" for cut in cuts)], found)


def _gradient_cell(values: dict) -> str:
    if "relative_error" not in values:
        return MISSING
    return f"{values['relative_error']:.1e} ({values['length']:.2f}x)"


def speed(rows: Rows) -> str:
    """A training step with a teacher against TRL's and against a plain step."""
    found = []
    for name, values in rows.items():
        if "plain_ms" in values:
            times = [
                number(values.get(f"{side}_ms"), "{:.0f} ms") for side in ("plain", "teacher", "hf_slim", "trl_gkd")
            ]
            plain_and_teacher = median(values["plain_ms"]) + median(values["teacher_ms"])
            found.append([
                name, *times, ratio(values["hf_slim_ms"], values.get("trl_gkd_ms")),
                ratio(values["hf_slim_ms"], plain_and_teacher), ratio(values["stored_ms"], values["plain_ms"]),
            ])  # fmt: skip
    titles = ["divergence", "plain step", "teacher's forward", "hf_slim", "TRL GKD", "of TRL's", "of plain + teacher",
              "stored teacher, of plain"]  # fmt: skip
    return table(titles, found)


def memory(rows: Rows) -> str:
    """Peak memory of a training step beyond the loaded models."""
    found = []
    for name, values in rows.items():
        if "hf_slim_peak_bytes" in values:
            ours, theirs = values["hf_slim_peak_bytes"], values.get("trl_gkd_peak_bytes")
            shown = [number(scaled(value, MIB), "{:.0f} MiB") for value in (ours, theirs)]
            found.append([name, *shown, ratio(ours, theirs)])
    return table(["divergence", "hf_slim", "TRL GKD", "of TRL's"], found)


def stored(rows: Rows) -> str:
    """Half of SmolLM2 after the same run with and without a teacher."""
    names = [name for name in rows if name.startswith("teacher ")]
    found = [[name.removeprefix("teacher "), number(rows[name]["perplexity"])] for name in names]
    return table(["teacher of 15 of SmolLM2's layers", "held-out perplexity"], found)


def quality(rows: Rows) -> str:
    """Students trained alone, by GKD and with hf_slim: means over seeds with the smallest and largest."""
    found = []
    for task, (title, unit) in TASKS.items():
        names = [name.split(", ") for name in rows if name.startswith(f"{task}, ")]
        for student in dict.fromkeys(parts[1] for parts in names if len(parts) == 4):
            cells = [_over_seeds(rows, f"{task}, {student}, {side}, ", unit) for side in ("alone", "GKD", "hf_slim")]
            found.append([f"{title}, {unit}", student, _over_seeds(rows, f"{task}, teacher", unit), *cells])
    return table(["task", "student", "teacher", "alone", "TRL GKD", "hf_slim"], found, text_columns=2)


def _over_seeds(rows: Rows, start: str, unit: str) -> str:
    values = [row[unit] * (100 if unit == "accuracy" else 1) for name, row in rows.items() if name.startswith(start)]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else MISSING
    return f"{statistics.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}], {len(values)} seeds"


def peers_step(rows: Rows) -> list[list[str]]:
    """The row of the table of peers: time and memory of a step."""
    values = rows.get("forward KL", {})
    if "trl_gkd_ms" not in values or "trl_gkd_peak_bytes" not in values:
        return []
    shown = [f"{median(values[f'{side}_ms']):.0f} ms, {median(scaled(values[f'{side}_peak_bytes'], MIB)):.0f} MiB"
             for side in ("trl_gkd", "hf_slim")]  # fmt: skip
    return [["One step of distillation, forward KL: time and memory", "TRL GKD", *shown]]


def peers_gradient(rows: Rows) -> list[list[str]]:
    """The row of the table of peers: accumulation in two processes."""
    cut = "2 processes, 2 x 2"
    theirs, ours = (
        measure(rows, f"{side}, {cut}", "relative_error") for side in ("TRL `GKDTrainer`", "hf_slim, `Trainer`")
    )
    if theirs is None or ours is None:
        return []
    what = "Relative error of the gradient: 2 processes with 2 micro-batches each, against one batch"
    return [[what, "TRL GKD", f"{theirs:.1e}", f"{ours:.1e}"]]
