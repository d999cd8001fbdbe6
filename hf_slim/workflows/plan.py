"""The plan of a recipe as text: `hf-slim train --dry-run`. Nothing is trained and nothing is written."""

import logging
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimDataError
from hf_slim.core.host import config_value
from hf_slim.data import load_texts, reading_once
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.integration.loading import float32_bytes, lacks_head, load_skeleton, load_tokenizer
from hf_slim.integration.previews import Inputs, Preview
from hf_slim.integration.saving import check_output
from hf_slim.integration.techniques import previews_of
from hf_slim.recipe import Recipe
from hf_slim.student import student_skeleton
from hf_slim.vocabulary.rows import trim_vocabulary_
from hf_slim.workflows.shrink_vocabulary import choose_kept

logger = logging.getLogger(__name__)
FLOAT_BITS = 32


def dry_run(recipe: Recipe | str | Path, overwrite: bool = False) -> str:
    """The plan of a run as text, after every check that the run would make: `hf-slim train --dry-run`.

    Args:
        recipe: A recipe or the path of one.
        overwrite: Whether the run may replace a finished model in the output folder.
    Raises: SlimError: for every error that `run` would raise before its first step.
    """
    recipe = Recipe.of(recipe)
    check_output(Path(recipe.output), overwrite)
    return describe_recipe(recipe)


@reading_once()
def describe_recipe(recipe: Recipe) -> str:
    """The plan of a run as text: steps, parameters, bytes, and the schemes and removed groups of each layer.

    Raises: SlimError: for every error that `train` would raise before its first step.
    """
    task, first = TASKS[recipe.task], recipe.runs[0]
    train, _ = load_texts(first.data, task.columns(first.data))
    label_names = task.label_names(train, first.data)
    tokenizer = load_tokenizer(recipe.model)
    model = load_skeleton(recipe.model, task.auto_class, label_names)
    task.configure_(model, tokenizer)
    lines = [f"model       {recipe.model} ({type(model).__name__})"]
    if label_names is not None:
        fresh = ", a fresh head" if lacks_head(recipe.model, task.auto_class) else ""
        lines.append(f"classes     {len(label_names)}: {', '.join(label_names[:8])}{fresh}")
    if recipe.vocabulary is not None:
        before = model.get_input_embeddings().num_embeddings
        choice = choose_kept(model, tokenizer, [stage.data for stage in recipe.runs], recipe.vocabulary.round_to)
        lines.append(f"vocabulary  {before:,} -> {len(trim_vocabulary_(model, choice.new_ids)):,} rows")
    for number, stage in enumerate(recipe.runs, 1):
        logger.info("Planning stage %d of %d.", number, len(recipe.runs))
        lines += ["", f"stage {number} of {len(recipe.stages)}"] if recipe.stages else []
        if stage.student is not None:
            before = sum(parameter.numel() for parameter in model.parameters())
            model = student_skeleton(model, stage.student)
            left = sum(parameter.numel() for parameter in model.parameters())
            lines.append(f"student     {before / 1e6:.1f} M -> {left / 1e6:.1f} M")
        previews = previews_of(model, stage.techniques, Inputs(tokenizer, task.auto_class))
        lines += _stage_lines(stage, model, tokenizer, previews)
        if number < len(recipe.runs):  # the next stage starts from the smaller model
            for preview in previews:
                preview.shrink_()
    return "\n".join([*lines, "", f"output      {recipe.output}"])


def check_examples(stage: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes one example of the training data and one of the held-out data, before hours are spent on them.

    Raises: SlimDataError: if either part is too short, has other labels than the model, or gives examples that are
        longer than the model's positions.
    """
    args, task = stage.training_arguments(stage.output), TASKS[stage.task]
    positions = config_value(model, "max_position_embeddings")
    for texts in load_texts(stage.data, task.columns(stage.data)):
        example = task.examples(texts, tokenizer, model.config.label2id, stage.data, 1, args.seed)[0]
        length = len(example["input_ids"])
        if isinstance(positions, int) and 0 < positions < length:
            raise SlimDataError(
                f"`data.block_size` {stage.data.block_size} gives examples of {length} tokens, and the model has "
                f"{positions} positions. Set `data.block_size` to at most {positions}."
            )


def _stage_lines(
    stage: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, previews: list[Preview]
) -> list[str]:
    args = stage.training_arguments(stage.output)
    check_examples(stage, model, tokenizer)
    before = sum(parameter.numel() for parameter in model.parameters())
    removed = sum(amount for preview in previews for amount, _ in preview.removed)
    batch = args.train_batch_size * args.gradient_accumulation_steps
    steps = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return [
        f"training    {steps} of {batch} x {stage.data.block_size} tokens, learning rate {args.learning_rate:g}",
        f"techniques  {', '.join(stage.techniques) or 'none: an ordinary fine-tune'}",
        f"parameters  {before / 1e6:.1f} M -> {(before - removed) / 1e6:.1f} M",
        f"weights     {float32_bytes(model) / 1e6:.1f} MB in float32 -> about "
        f"{bytes_after(model, previews) / 1e6:.1f} MB",
        *(line for preview in previews for line in preview.lines),
        *_layer_lines(model, previews),
    ]


def bytes_after(model: nn.Module, previews: list[Preview]) -> float:
    """Estimated bytes of the weights of `model` on disk, after everything in `previews` has happened."""
    bits = {name: count for preview in previews for name, count in preview.bits.items()}
    total, seen = 0.0, set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel() * (bits.get(name, FLOAT_BITS) if parameter.dim() > 1 else FLOAT_BITS) / 8
    removed = [pair for preview in previews for pair in preview.removed]
    return total - sum(amount * bits.get(layer, FLOAT_BITS) / 8 for amount, layer in removed)


def _layer_lines(model: nn.Module, previews: list[Preview]) -> list[str]:
    previewed = [preview.layers for preview in previews if preview.layers]
    lines = []
    for name, module in model.named_modules():
        changes = [layers[name] for layers in previewed if name in layers]
        if previewed and (changes or isinstance(module, nn.Linear | nn.Embedding)):
            shape = " x ".join(map(str, next(module.parameters(recurse=False)).shape))
            lines.append(f"  {name:<44} {shape:>14}   {', '.join(changes) or 'float'}")
    return ["", *lines] if lines else []
