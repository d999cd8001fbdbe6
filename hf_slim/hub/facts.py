"""What a report says, in the words of a card: names, what was done, and before against after.

A report may lack anything but its title and the measures of both sides: older ones, and those of a Trainer, say less.
"""

import math
from pathlib import PurePosixPath
from typing import Any

from hf_slim.core.report import ROWS, STDLIB, find, improvement, table, value_of, within_spread

Report = dict[str, Any]
DISK = "files on disk"
GROUPS = {  # first key of a measure -> name of its group, and the words for better, worse
    "quality": ("quality", "better", "worse"),
    "compute": ("compute", "smaller", "larger"),
    "memory": ("memory", "smaller", "larger"),
    "training": ("training speed", "faster", "slower"),
    "inference": ("inference speed", "faster", "slower"),
}
TECHNIQUES = {"vocabulary": "a smaller vocabulary", "student": "a smaller shape", "distillation": "distillation",
              "pruning": "pruning", "quantization": "quantization"}  # fmt: skip
AUTO_CLASSES = {"sequence-classification": "AutoModelForSequenceClassification"}
PIPELINES = {  # auto class -> the Hub's name of the task
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
}
CERTAIN = 1.96  # standard errors on each side of a mean: 95% of a normal distribution


def recipe_of(report: Report) -> dict[str, Any]:
    """The recipe in a report; empty if there is none."""
    return report.get("recipe") or {}


def saved_of(report: Report) -> dict[str, Any]:
    """What the report says about its folder. What an older report does not say follows from its recipe.

    A folder whose format is not known counts as slim: a snippet with `import hf_slim` loads every folder of hf_slim.
    """
    task = recipe_of(report).get("task", "causal-lm")
    guessed = {
        "format": "slim", "auto_class": AUTO_CLASSES.get(task, "AutoModelForCausalLM"), "has_tokenizer": True,
        "techniques": {}, "weights": {},
    }  # fmt: skip
    return guessed | report.get("saved", {})


def stages_of(report: Report) -> list[dict[str, Any]]:
    """The settings of every stage, or the recipe itself as the only one; what a folder says of itself otherwise."""
    recipe = recipe_of(report)
    top = {name: value for name, value in recipe.items() if name != "stages"}
    if not set(TECHNIQUES) & set(recipe) and "stages" not in recipe:
        top |= saved_of(report)["techniques"]
    stages = [top | changes for changes in recipe.get("stages", [{}])]
    for later in stages[1:]:
        later.pop("vocabulary", None)  # it is made smaller once, before the first stage
    return stages


def techniques_of(report: Report) -> list[str]:
    """Names of the techniques of all stages, in the order in which they work."""
    return [name for name in TECHNIQUES if any(stage.get(name) is not None for stage in stages_of(report))]


def base_name(report: Report) -> str:
    """What people call the base model."""
    model = report.get("sources", {}).get("model", {}).get("name") or recipe_of(report).get("model") or "the base"
    return PurePosixPath(model.rstrip("/")).name if ":" in model or model.startswith(("/", ".", "~")) else model


def package_of(report: Report) -> str | None:
    """The Python package that carries the base model, if one does."""
    model = str(recipe_of(report).get("model", ""))
    return model.removeprefix("package:").partition("/")[0] if model.startswith("package:") else None


def data_sources(report: Report) -> list[dict[str, Any]]:
    """Every source of text: `name`, and `hub_id` of a dataset on the Hub. Local paths lose their folders."""
    if described := report.get("sources", {}).get("data"):
        return described
    names = dict.fromkeys(stage["data"]["source"] for stage in stages_of(report) if "data" in stage)
    return [{"name": STDLIB if name == "stdlib" else PurePosixPath(name).name, "hub_id": None} for name in names]


def changes(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Rows (group, measure, base, result, change) of everything that was measured on either side.

    A base that was read from other files than those that are compared has a second row for its bytes on disk.
    """
    texts = {label: (base, result) for label, base, result, _ in table(report)}
    rows = []
    for name, (group, _, _) in GROUPS.items():
        for label, path, _, _ in ROWS:
            if path[0] == name and label in texts:
                rows.append((group, _full(report, label), *texts[label], change(report, label)))
                rows += _against_given(report) if label == DISK else []
    return rows


def _full(report: Report, label: str) -> str:
    """A label; that of bytes on disk says with what they are compared."""
    dtype = report["base"].get("dtype")
    return f"{DISK}, against a {dtype} copy" if label == DISK and dtype else label


def _against_given(report: Report) -> list[tuple[str, str, str, str, str]]:
    """The row that compares bytes on disk with the files that the base was read from; none if they are alike."""
    given, result = given_bytes(report), result_bytes(report)
    copy = value_of(find(report["base"], ("memory", "disk_bytes")))
    if not given or not result or (copy and abs(given / copy - 1) < 0.02):
        return []
    how = factor_in_words(given / result, "memory")
    return [("memory", f"{DISK}, against the files given", megabytes(given), megabytes(result), how)]


def change(report: Report, label: str) -> str:
    """How a measure changed, in words: "1.81x faster", "1.07x worse"; "" if it was not measured on both sides.

    Two timings whose ranges overlap differ by no more than their spread, which is what is said then.
    """
    path, smaller = next((path, smaller) for name, path, _, smaller in ROWS if name == label)
    base, result = find(report["base"], path), find(report["result"], path)
    factor = improvement(base, result, smaller)
    if factor is None:
        return ""
    if within_spread(base, result):
        return "within the spread"
    return factor_in_words(factor, path[0])


def factor_in_words(factor: float, group: str) -> str:
    """How many times better the result is, in words; below 1 it is worse.

    Args:
        group: A key of `GROUPS`.
    """
    _, better, worse = GROUPS[group]
    if abs(factor - 1) < 0.005:
        return "the same"
    return f"{factor:.2f}x {better}" if factor > 1 else f"{1 / factor:.2f}x {worse}"


def megabytes(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 1e6:.1f} MB"


def quality_label(report: Report) -> str | None:
    """The row that says how good the result is; None if that was not measured."""
    rows = (label for label, path, _, _ in ROWS if path[0] == "quality" and find(report["result"], path) is not None)
    return next(rows, None)


def quality_interval(side: dict[str, Any]) -> tuple[float, float] | None:
    """The 95% interval of a side's perplexity or accuracy over held-out texts; None if the report does not give it.

    That of a perplexity is in the report. That of an accuracy follows from the number of examples.
    Source: Wilson 1927, the score interval.
    """
    quality = side.get("quality", {})
    if quality.get("perplexity_interval"):
        low, high = quality["perplexity_interval"]
        return low, high
    if "accuracy" not in quality or not quality.get("examples"):
        return None
    share, count = quality["accuracy"], quality["examples"]
    scale = 1 + CERTAIN**2 / count
    middle = (share + CERTAIN**2 / (2 * count)) / scale
    width = CERTAIN * math.sqrt(share * (1 - share) / count + CERTAIN**2 / (4 * count**2)) / scale
    return middle - width, middle + width


def given_bytes(report: Report) -> int | None:
    """Bytes of the files that the base model was read from; None if the report does not say."""
    return report.get("sources", {}).get("model", {}).get("bytes")


def result_bytes(report: Report) -> float | None:
    """Bytes of the result's files; None if they were not measured."""
    return value_of(find(report["result"], ("memory", "disk_bytes")))


def is_of_a_run(report: Report) -> bool:
    """Whether the report is of a recipe that `hf-slim train` can repeat."""
    return {"model", "output", "training", "data"} <= recipe_of(report).keys()


def base_is_tuned(report: Report) -> bool | None:
    """Whether the base was fine-tuned on the data as the result was; None if the report is not of a run."""
    if not is_of_a_run(report):
        return None
    starts = "The base is the model after stage"  # how reports said it before they had a field of their own
    return report.get("base_is_tuned", any(note.startswith(starts) for note in report.get("notes", ())))
