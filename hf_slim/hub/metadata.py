"""The header of a model card: what the Hub reads, lists and filters by."""

import re
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCardData

from hf_slim.core.report import find
from hf_slim.hub.facts import PIPELINES, Report, data_sources, recipe_of, saved_of, stages_of, techniques_of

KEPT = ("base_model", "datasets", "language", "license", "license_link", "license_name", "model-index")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
METRICS = {  # the Hub's name of a metric -> its name for people, and where it lies
    "perplexity": ("Perplexity", ("quality", "perplexity")),
    "accuracy": ("Accuracy", ("quality", "accuracy")),
    "loss": ("Cross-entropy", ("quality", "loss")),
}


def metadata(report: Report, name: str, extra: dict[str, Any] | None = None) -> str:
    """The YAML header of the card, without its lines of dashes.

    `base_model`, `license` and `datasets` are there only where the report knows them by the names of the Hub.

    Args:
        name: Of the model, without the user's name.
        extra: Fields that the report says nothing about, such as those of a Trainer; tags are joined.
    """
    extra = extra or {}
    source = report.get("sources", {}).get("model", {})
    datasets = [found["hub_id"] for found in data_sources(report) if found.get("hub_id")]
    results = eval_results(report)
    ours = ModelCardData(
        base_model=source.get("hub_id"),
        datasets=datasets or None,
        eval_results=results or None,
        library_name="transformers",
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=source.get("license_link"),
        model_name=name if results else None,
        pipeline_tag=pipeline(report),
        tags=[*tags(report), *(extra.get("tags") or ())],
    ).to_dict()
    fields = ours | {key: value for key, value in extra.items() if key in KEPT and key not in ours}
    if not HUB_ID.fullmatch(str(fields.get("base_model", ""))):
        fields.pop("base_model", None)  # a Trainer takes any name of a model for one
    if "base_model" in fields:
        fields["base_model_relation"] = relation(report)
    return CardData(**fields).to_yaml(line_break="\n")


def relation(report: Report) -> str:
    """What the model is to its base: a word that the Hub knows."""
    return "quantized" if "quantization" in techniques_of(report) else "finetune"


def pipeline(report: Report) -> str | None:
    """The Hub's name of the model's task, if it has one."""
    return PIPELINES.get(saved_of(report)["auto_class"])


def tags(report: Report) -> list[str]:
    """Words to find the model by: hf_slim, the techniques, and the grid by name."""
    found = ["hf_slim", *techniques_of(report)]
    schemes = [(stage.get("quantization") or {}).get("scheme") for stage in stages_of(report)]
    return [*found, *dict.fromkeys(scheme for scheme in schemes if isinstance(scheme, str))]


def eval_results(report: Report) -> list[EvalResult]:
    """The result's quality in the Hub's schema; empty if it was not measured, or on data without a name."""
    sources, task = data_sources(report), pipeline(report)
    if not sources or task is None:
        return []
    data = recipe_of(report).get("data", {})
    held_out = sources[-1]
    return [
        EvalResult(
            task_type=task,
            dataset_type=held_out.get("hub_id") or "other",
            dataset_name=held_out["name"],
            dataset_config=data.get("load", {}).get("name"),
            dataset_split=data.get("evaluation_split") if held_out.get("hub_id") else "held out",
            metric_type=metric,
            metric_name=f"{label}, held out",
            metric_value=round(value, 4),
        )
        for metric, (label, path) in METRICS.items()
        if (value := find(report["result"], path)) is not None
    ]
