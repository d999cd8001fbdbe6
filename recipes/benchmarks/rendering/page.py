"""The page of all benchmarks: what was measured, the tables, and the record of the runs behind them."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rendering import distillation, overview, pruning, quantization
from rendering.markdown import Rows

Tables = tuple[tuple[str, str, Callable[[Rows], str]], ...]
INTRODUCTION = """# Benchmarks

Every table on this page is rendered from `recipes/benchmarks/results/*.json` by `make tables`. A result names the
command, the commit, the machine and the versions that it was measured with. Times are medians with the smallest and
the largest in brackets; all sides take turns in one process. Perplexity is measured on held-out text. A dash, or a
table that is missing, was not measured.
"""


@dataclass(frozen=True)
class Section:
    """Some tables under one title.

    Attributes:
        text: What was measured, and how.
        tables: Name of the table, file of its results, and the function that renders it.
    """

    title: str
    text: str
    tables: Tables


PAGE_SECTIONS: tuple[Section, ...] = (
    Section(
        "Quickstart",
        "`recipes/quickstart.yaml`: SmolLM2-135M is fine-tuned on Python's own source files for 64 steps of 512 "
        "tokens while it is pruned, quantized and distilled from its uncompressed self. The base is the same weights "
        "as an fp32 checkpoint.",
        (("quickstart", "quickstart", overview.quickstart), ("uncompressed", "quickstart", overview.uncompressed)),
    ),
    Section(
        "Quantization-aware training against torchao: quality",
        "SmolLM2-135M, weights only, symmetric groups of 64; data, steps, seed and learning rate are the same for "
        "both sides. With the teacher `self`, half of the loss compares with the untouched model. Recovered is the "
        "share of the gap between the fine-tuned float model rounded to nearest and the same model unrounded. Both "
        "sides are judged in the bf16 autocast that the Trainer leaves on, the two float columns in fp32. One seed.",
        (("quantization-quality", "quantization_quality", quantization.quality),),
    ),
    Section(
        "Quantization-aware training against torchao: cost of a step",
        "A Llama with 4 layers of 512, 1024 tokens a step, as a multiple of a plain step. With quantized activations, "
        "torchao's are asymmetric per token, because it has no symmetric ones.",
        (("quantization-training", "quantization_training", quantization.training),
         ("quantization-plain-step", "quantization_training", quantization.plain_step)),
    ),
    Section(
        "Inference of quantized models",
        "SmolLM2-135M, batch size 1, CPU; the embedding is int8 throughout. The last column decodes with a static "
        "cache under `torch.compile`, against fp32 with a static cache and without it.",
        (("quantization-inference", "quantization_inference", quantization.inference),),
    ),
    Section(
        "Pruning against Torch-Pruning: quality",
        "SmolLM2-135M without a share of its transformer's parameters, after the same recovery for both sides, "
        "without a teacher. Torch-Pruning uses its Hessian criterion over all layers, on neurons alone as "
        "hf_slim does here. Models that were trained are judged in the bf16 autocast that the Trainer leaves on, for "
        "both sides, the others in fp32. One seed.",
        (("pruning-quality", "pruning_quality", pruning.quality),
         ("pruning-references", "pruning_quality", pruning.references),
         ("torch-pruning-criteria", "pruning_torch_pruning_criteria", pruning.torch_pruning_criteria)),
    ),
    Section(
        "Pruning criteria",
        "One shot, without training and repair; groups are ranked across all layers. SmolLM2: held-out perplexity as "
        "a multiple of the dense model's. MiniLM on SST-2: accuracy.",
        (("pruning-criteria", "pruning_criteria", pruning.criteria),),
    ),
    Section(
        "Pruning an encoder",
        "MiniLM-L6 on SST-2: heads and neurons are removed gradually across all layers by the Taylor criterion while "
        "the fine-tuned model teaches; one epoch for every row, 872 validation sentences, one seed.",
        (("pruning-encoder", "pruning_encoder", pruning.encoder),),
    ),
    Section(
        "Speed and memory of pruning",
        "Half of the multiply-adds of a model are removed, the same share in every layer. The callback's cost is "
        "measured in bf16 steps of 512 tokens; a run computes scores in every second step at most.",
        (("pruning-speed", "pruning_speed", pruning.speed), ("pruning-size", "pruning_speed", pruning.size),
         ("pruning-callback", "pruning_speed", pruning.callback),
         ("pruning-removal", "pruning_speed", pruning.removal)),
    ),
    Section(
        "Exactness of a distillation step",
        "The relative error of the gradient of one optimizer step when the same 8 texts, with different numbers of "
        "labels, arrive in 4 micro-batches of 2 or in two processes; in brackets the factor by which its length is "
        "off. TRL's trainers run off-policy on the same tokens and labels.",
        (("distillation-gradients", "distillation_gradients", distillation.gradients),),
    ),
    Section(
        "Cost of a distillation step",
        "A Llama of 15 M parameters learns from one of 48 M: vocabulary 49,152, 4 x 256 tokens, fp32, CPU. hf_slim "
        "computes the task loss as well. Memory is what two steps take beyond the loaded models, in fresh processes. "
        "The last table trains half of SmolLM2 with a teacher in memory and with the same teacher stored.",
        (("distillation-speed", "distillation_speed", distillation.speed),
         ("distillation-memory", "distillation_speed", distillation.memory),
         ("distillation-stored", "distillation_stored", distillation.stored)),
    ),
    Section(
        "What a teacher adds",
        "Students with some of the layers are trained alone, by TRL's GKD and with hf_slim: the same start, steps, "
        "rates and data. GKD has TRL's defaults without texts that the student writes.",
        (("distillation-quality", "distillation_quality", distillation.quality),),
    ),
)  # fmt: skip


def page(contents: dict[str, Any], tables: dict[str, str]) -> str:
    """The page; a section without a result is left out.

    Args:
        contents: Name of a results file -> its content.
        tables: Name of a table -> its Markdown.
    """
    parts = [INTRODUCTION]
    if tables["peers"]:
        parts.append(f"## Against peers\n\n{tables['peers']}\n")
    for section in PAGE_SECTIONS:
        found = [tables[name] for name, _, _ in section.tables if tables[name]]
        if found:
            files = dict.fromkeys(file for name, file, _ in section.tables if tables[name])
            records = [record for file in files for record in _records(contents[file])]
            body = "\n\n".join([f"## {section.title}", textwrap.fill(section.text, 119), *found, "\n".join(records)])
            parts.append(body + "\n")
    return "\n".join(parts)


def _records(content: dict[str, Any]) -> list[str]:
    """A line of the list for every run behind a file of results."""
    found = []
    for run in content["runs"]:
        machine = run["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        found.append(
            f"- `{run['command']}`, {run['date'][:10]}, commit {run['commit']}: {machine['processor']}, "
            f"{machine['threads']} of {machine['cores']} cores; {versions}"
        )
    return found
