"""What a recipe would do, and what a model is made of: text for people, touching nothing."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_slim.data import load_texts, reading_once
from hf_slim.distillation.store.reader import is_stored_teacher
from hf_slim.distillation.teachers.live import check_teacher
from hf_slim.distillation.teachers.stored import DiskTeacher
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.integration.loading import float32_bytes, lacks_head, load_skeleton, load_tokenizer
from hf_slim.integration.saving import check_output
from hf_slim.pruning.budget.plan import Plan, expected_losses
from hf_slim.pruning.removal.cut import cut_out_
from hf_slim.pruning.transform import plan_pruning
from hf_slim.quantization.plan import plan_quantization
from hf_slim.quantization.scheme import Scheme
from hf_slim.recipe import Recipe
from hf_slim.student import student_skeleton
from hf_slim.vocabulary.rows import trim_vocabulary_
from hf_slim.workflows.shrink_vocabulary import choose_kept, texts_of


def dry_run(recipe: Recipe | str | Path, overwrite: bool = False) -> str:
    """The plan of a run as text, after every check that the run would make: `hf-slim train --dry-run`.

    Args:
        recipe: A recipe or the path of one.
        overwrite: Whether the run may replace a finished model in the output folder.
    Raises: SlimError: for everything that `run` would refuse before its first step.
    """
    recipe = Recipe.of(recipe)
    check_output(Path(recipe.output), overwrite)
    return describe_recipe(recipe)


@reading_once()
def describe_recipe(recipe: Recipe) -> str:
    """The plan of a run as text: steps, parameters, bytes, and what each layer becomes in each stage.

    Raises: SlimError: for everything that `train` would refuse before its first step.
    """
    task, first = TASKS[recipe.task], recipe.runs[0]
    train, _ = load_texts(first.data, task.columns(first.data))
    label_names = task.label_names(train, first.data)
    tokenizer = load_tokenizer(recipe.model)
    model = load_skeleton(recipe.model, task.auto_class, label_names)
    task.settle_(model, tokenizer)
    lines = [f"model       {recipe.model} ({type(model).__name__})"]
    if label_names is not None:
        fresh = ", a fresh head" if lacks_head(recipe.model, task.auto_class) else ""
        lines.append(f"classes     {len(label_names)}: {', '.join(label_names[:8])}{fresh}")
    if recipe.vocabulary is not None:
        before = model.get_input_embeddings().num_embeddings
        texts = texts_of(*(stage.data for stage in recipe.runs))
        choice = choose_kept(model, tokenizer, texts, recipe.vocabulary.round_to)
        lines.append(f"vocabulary  {before:,} -> {len(trim_vocabulary_(model, choice.new_ids)):,} rows")
    for number, stage in enumerate(recipe.runs, 1):
        lines += ["", f"stage {number} of {len(recipe.stages)}"] if recipe.stages else []
        if stage.student is not None:
            before = sum(parameter.numel() for parameter in model.parameters())
            model = student_skeleton(model, stage.student)
            left = sum(parameter.numel() for parameter in model.parameters())
            lines.append(f"student     {before / 1e6:.1f} M -> {left / 1e6:.1f} M")
        plan = plan_pruning(model, stage.pruning) if stage.pruning else None
        lines += _stage_lines(stage, model, tokenizer, plan)
        if plan is not None and number < len(recipe.runs):  # the next stage starts from the smaller model
            gone = {name: list(range(round(groups))) for name, groups in expected_losses(plan).items()}
            cut_out_(model, plan.group_sets, gone)
    return "\n".join([*lines, "", f"output      {recipe.output}"])


def _stage_lines(stage: Recipe, model: nn.Module, tokenizer: PreTrainedTokenizerBase, plan: Plan | None) -> list[str]:
    args, task = stage.training_arguments(stage.output), TASKS[stage.task]
    texts, _ = load_texts(stage.data, task.columns(stage.data))
    task.examples(texts, tokenizer, model.config.label2id, stage.data, 1, args.seed)
    for name in stage.distillation.teachers if stage.distillation else ():
        if is_stored_teacher(name):
            DiskTeacher(name, model, tokenizer, stage.distillation)
        elif name != "self":
            shares = bool(set(stage.distillation.divergences) - {"universal"})
            check_teacher(model, load_skeleton(name, task.auto_class), shares)
    schemes = _schemes(model, stage)
    removed = _removed_per_layer(model, plan)
    before = sum(parameter.numel() for parameter in model.parameters())
    lost = sum(groups * size for groups, size, _ in removed)
    stored = _bytes(model, schemes, removed)
    batch = args.train_batch_size * args.gradient_accumulation_steps
    steps = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return [
        f"training    {steps} of {batch} x {stage.data.block_size} tokens, learning rate {args.learning_rate:g}",
        f"techniques  {', '.join(stage.techniques) or 'none: an ordinary fine-tune'}",
        f"parameters  {before / 1e6:.1f} M -> {(before - lost) / 1e6:.1f} M",
        f"weights     {float32_bytes(model) / 1e6:.1f} MB in float32 -> about {stored / 1e6:.1f} MB",
        *(_timing_lines(plan.timings) if plan and plan.timings else []),
        *(["", *_layer_lines(model, schemes, removed, stage)] if plan or schemes else []),
    ]


Removal = tuple[float, int, tuple[str, ...]]  # groups that go on average, parameters per group, layers that lose them


def _removed_per_layer(model: nn.Module, plan: Plan | None) -> list[Removal]:
    if plan is None:
        return []
    losses = expected_losses(plan)
    return [
        (
            losses[found.name],
            found.parameters_per_group(model),
            tuple(dict.fromkeys(part.module for part in found.slices)),
        )
        for found in plan.group_sets
    ]


def _timing_lines(timings: dict[str, Any]) -> list[str]:
    """What a target in time goes by."""
    read = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in timings["inputs"].items())
    lines = [f"measured    on {timings['device']} in {timings['dtype']}, {read}: layers {timings['total_ms']:.1f} ms"]
    for curve in timings["curves"]:
        steps = ", ".join(f"{kept}: {ms:.2f}" for kept, ms in zip(curve["kept"], curve["ms"], strict=True))
        alike = f" (and {len(curve['group_sets']) - 1} alike)" if len(curve["group_sets"]) > 1 else ""
        lines.append(f"            {curve['group_sets'][0]}{alike}, ms by what is kept: {steps}")
    return lines


def _schemes(model: nn.Module, recipe: Recipe) -> dict[str, Scheme | str]:
    if recipe.quantization is None:
        return {}
    return {plan.name: plan.scheme or plan.reason for plan in plan_quantization(model, recipe.quantization)}


def _bytes(model: nn.Module, schemes: dict[str, Scheme | str], removed: list[Removal]) -> float:
    total, seen = 0.0, set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                quantized = parameter.dim() > 1 and isinstance(schemes.get(name), Scheme)
                total += _stored_bytes(parameter, schemes[name]) if quantized else 4 * parameter.numel()
    for groups, size, layers in removed:
        scheme = schemes.get(layers[0])
        total -= groups * size * (scheme.weights.storage_bits / 8 if isinstance(scheme, Scheme) else 4)
    return total


def _stored_bytes(parameter: nn.Parameter, scheme: Scheme) -> float:
    return parameter.numel() * scheme.weights.bits_per_value(parameter[0].numel()) / 8


def _layer_lines(
    model: nn.Module, schemes: dict[str, Scheme | str], removed: list[Removal], recipe: Recipe
) -> list[str]:
    losses: dict[str, list[float]] = {}
    for groups, _, layers in removed:
        for layer in layers:
            losses.setdefault(layer, []).append(groups)
    lines = []
    for name, module in model.named_modules():
        if name in schemes or isinstance(module, nn.Linear | nn.Embedding):
            shape = " x ".join(map(str, next(module.parameters(recurse=False)).shape))
            fate: list[Any] = [f"loses {groups:g} groups" for groups in losses.get(name, [])]
            scheme = schemes.get(name)
            fate += [str(scheme)] if isinstance(scheme, Scheme) else [f"float ({scheme})"] if scheme else ["float"]
            lines.append(f"  {name:<44} {shape:>14}   {', '.join(fate)}")
    if recipe.pruning and not all(recipe.pruning.uniform_by_kind.values()):
        lines.append("  Where layers may differ the number of groups is an average: training decides which go.")
    return lines
