"""The sections of a card, each a function of the report; "" where the report has nothing to say."""

from typing import Any

from hf_slim.core.report import find, notes
from hf_slim.hub.facts import (
    TECHNIQUES,
    Report,
    base_is_tuned,
    base_name,
    change,
    changes,
    data_sources,
    given_bytes,
    is_of_a_run,
    megabytes,
    package_of,
    quality_interval,
    quality_label,
    recipe_of,
    result_bytes,
    saved_of,
    stages_of,
    techniques_of,
)
from hf_slim.hub.steps import steps_of

SHOWN_SPEEDS = ("prefill", "decode", "throughput")
DATASETS = "https://huggingface.co/datasets"
ENVIRONMENT = ("processor", "threads", "accelerator", "torch", "transformers")


def headline(report: Report) -> str:
    """One sentence: what the model is, its size, its speed, and its quality against the base."""
    rows = {label: (base, result, how) for _, label, base, result, how in changes(report)}
    said = [_size(report, rows)]
    speeds = [(label, rows[label][2]) for label in SHOWN_SPEEDS if label in rows and rows[label][2]]
    said += [f"{label} {'unchanged ' if how == 'within the spread' else ''}{how}" for label, how in speeds]
    label = quality_label(report)
    if label is None:
        said.append("its quality was not measured")
    else:
        base, result, how = rows[label]
        said.append(f"{label} {result} (base: {base}{f', so {how}' if how else ''})")
    done = [TECHNIQUES[technique] for technique in techniques_of(report)] or ["fine-tuning"]
    return f"{base_name(report)} after {_listed(done)}: {'; '.join(text for text in said if text)}."


def _size(report: Report, rows: dict[str, tuple[str, str, str]]) -> str:
    """The result's bytes on disk beside those of the base as it was given and as it is compared, or its parameters."""
    disk, copy = result_bytes(report), find(report["base"], ("memory", "disk_bytes"))
    given, dtype = given_bytes(report), report["base"].get("dtype")
    if disk and copy:
        compared = f"{megabytes(copy)} as {dtype}" if dtype else megabytes(copy)
        read = f"{megabytes(given)} as given, " if given else ""
        return f"{megabytes(disk)} on disk (base: {read}{compared})"
    base, result, _ = rows.get("parameters", ("not measured", "not measured", ""))
    return "" if "not measured" in (base, result) else f"{result} parameters (base: {base})"


def done_section(report: Report) -> str:
    """What was done to the base, step by step."""
    stages = stages_of(report)
    lines = []
    for number, stage in enumerate(stages, 1):
        prefix = f"Stage {number}: " if len(stages) > 1 else ""
        lines += [f"- {prefix}{step}" for step in steps_of(stage)]
    return "## What was done\n\n" + "\n".join(lines) if lines else ""


def measures_section(report: Report) -> str:
    """Before and after: quality, compute, memory, training speed and inference speed."""
    rows = [
        f"| {group} | {label} | {base} | {result} | {how} |" for group, label, base, result, how in changes(report)
    ]
    missing = [group for group in ("quality", "compute", "memory", "training speed", "inference speed")
               if not any(row.startswith(f"| {group} |") for row in rows)]  # fmt: skip
    rows += [f"| {group} | not measured | | | |" for group in missing]
    header = "| | measure | base | result | change |\n|---|---|---:|---:|---|\n"
    paragraphs = [_what_the_base_is(report), _spread(report), *notes(report), _machine(report)]
    return "\n\n".join(["## Before and after", header + "\n".join(rows), *(text for text in paragraphs if text)])


def completions_section(report: Report) -> str:
    """How both models complete one prompt, folded."""
    texts = {side: report[side].get("prompt_and_completion") for side in ("base", "result")}
    if None in texts.values():
        return ""
    blocks = "\n\n".join(f"{side.capitalize()}:\n\n{_fenced(text)}" for side, text in texts.items())
    return _folded("The same prompt, completed by base and result", blocks)


def layers_section(report: Report) -> str:
    """What became of every layer, folded."""
    layers = report.get("layers") or []
    if not layers:
        return ""
    rows = [f"| `{row['name']}` | {row['scheme'] or 'float'} | {_cell(row.get('reason') or '')} |" for row in layers]
    quantized = sum(row["scheme"] is not None for row in layers)
    title = f"All {len(layers)} layers: {quantized} quantized, {len(layers) - quantized} in floating point"
    return _folded(title, "| layer | grid | why in floating point |\n|---|---|---|\n" + "\n".join(rows))


def limits_section(report: Report) -> str:
    """What the numbers do not say, and where the model does not run."""
    lines = []
    if saved_of(report)["format"] == "slim":
        lines.append(
            "This is a slim folder of hf_slim: it loads in Transformers after `import hf_slim`, and in no other "
            "runtime."
        )
    if quality_label(report) and is_of_a_run(report):
        lines.append(
            f"One run with one seed ({report.get('seed', 'not recorded')}). Intervals, where there are some, are over "
            "held-out texts; how much another seed would change is not known."
        )
    if quality_label(report):
        lines.append("Quality was measured on one held-out set; other abilities of the base may have changed more.")
    lines += _losses(report)
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def sources_section(report: Report) -> str:
    """Licence and data, by name."""
    source = report.get("sources", {}).get("model", {})
    licence = source.get("license")
    said = f"its licence is `{licence}`" if licence else "its licence is not recorded in the report: look it up there"
    carried = f" from the Python package `{package_of(report)}`" if package_of(report) else ""
    lines = [f"- Base model: {base_name(report)}{carried}; {said}. The licence of the base holds for this model too."]
    for data in data_sources(report):
        hub_id = data.get("hub_id")
        lines.append(f"- Data: [{hub_id}]({DATASETS}/{hub_id})." if hub_id else f"- Data: {data['name']}.")
    if not data_sources(report):
        lines.append("- Data: not recorded in the report.")
    if version := report.get("hf_slim_version"):
        lines.append(f"- Made with hf_slim {version}.")
    return "## Licence and data\n\n" + "\n".join(lines)


def reproduce_section(report: Report, name: str) -> str:
    """One command that does it again, or the callbacks of a Trainer that did it."""
    if is_of_a_run(report):
        command = "hf-slim train report.json --set output=again"
        if "/" in name:
            command = f"hf download {name} report.json --local-dir . && {command}"
        package = f", and the Python package `{package_of(report)}` the base model" if package_of(report) else ""
        return f"## Reproduce\n\nreport.json holds the whole recipe{package}:\n\n```bash\n{command}\n```"
    if "evaluation" in recipe_of(report):
        command = f"hf-slim eval {name} --against {recipe_of(report)['model']}"
        return f"## Reproduce\n\nThe measurement, on data of your own:\n\n```bash\n{command} --data stdlib\n```"
    configs = {f"{n.capitalize()}Callback": c for n, c in recipe_of(report).items() if n in TECHNIQUES and c}
    if not configs:
        return ""
    lines = "".join(f"    {callback}({_set(config)!r}),\n" for callback, config in configs.items())
    code = f"from hf_slim import {', '.join(sorted(configs))}\n\ncallbacks = [\n{lines}]\n"
    return f"## Reproduce\n\nA `Trainer` with these callbacks trained it:\n\n```python\n{code}```"


def _set(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value not in (None, {}, [])}


def _what_the_base_is(report: Report) -> str:
    """What the columns compare: which base, in which form, tuned or not."""
    dtype = report["base"].get("dtype")
    said = [f"The base is {base_name(report)}" + (f", saved and measured in {dtype}." if dtype else ".")]
    if str(recipe_of(report).get("model", "")).endswith(".gguf"):
        size = "is in the table" if given_bytes(report) else "is not recorded"
        said.append(
            f"It was read from a GGUF file, which may hold fewer bits per weight; the size of that file {size}."
        )
    tuned = base_is_tuned(report)
    if tuned is False:
        said.append(
            "It was not fine-tuned on the data and the result was, so compression may cost more quality than the "
            "table shows."
        )
    elif tuned:
        said.append("It was fine-tuned on the same data, without compression.")
    return " ".join(said)


def _spread(report: Report) -> str:
    label = quality_label(report)
    said = "Times are medians of interleaved rounds, with the smallest and the largest in brackets."
    if not any(row[0] in ("inference speed", "training speed") for row in changes(report)):
        said = ""
    if label is None:
        return said
    intervals = {side: quality_interval(report[side]) for side in ("base", "result")}
    percent = label.endswith("accuracy")
    known = [
        f"{side} {low:.2%} to {high:.2%}" if percent else f"{side} {low:.2f} to {high:.2f}"
        for side, (low, high) in ((side, found) for side, found in intervals.items() if found)
    ]
    count = _counted(report["result"].get("quality", {}))
    spread = f"{label[:1].upper()}{label[1:]}{count}: "
    spread += f"95% intervals over texts are {', '.join(known)}." if known else "its spread was not measured."
    return f"{said} {spread}".strip()


def _counted(quality: dict[str, Any]) -> str:
    found = [f"{quality[name]:,} {name}" for name in ("blocks", "examples") if quality.get(name)]
    return f", on {found[0]}" if found else ""


def _machine(report: Report) -> str:
    environment = report.get("environment") or {}
    found = [f"{name} {environment[name]}" for name in ENVIRONMENT if environment.get(name)]
    return f"Measured on: {', '.join(found)}." if found else ""


def _losses(report: Report) -> list[str]:
    """Every measure in which the result is behind the base, said once more."""
    rows = changes(report)
    behind = [f"{label}: {how}" for _, label, _, _, how in rows if how.endswith(("worse", "slower", "larger"))]
    step = find(report["result"], ("training", "step_ms"))
    said = [f"Where the result is behind the base: {'; '.join(behind)}."] if behind else []
    if step and change(report, "training step").endswith("slower"):
        said.append("A training step is that of the compressing run, with its callbacks, against a plain one.")
    return said


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
