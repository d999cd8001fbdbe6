"""Runs a recipe: trains with the callbacks, saves, reloads, measures and reports."""

import ctypes
import gc
import logging
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from hf_slim.core.errors import SlimError
from hf_slim.data import load_texts, reading_once
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.integration.loading import lacks_head, load_model, load_tokenizer
from hf_slim.integration.saving import check_output, publish, save
from hf_slim.integration.techniques import callbacks_for, layers_of
from hf_slim.integration.trainer import trainer_for
from hf_slim.progress import progress_is_shown
from hf_slim.recipe import Recipe
from hf_slim.student import make_student
from hf_slim.workflows.evaluate import compare, training_step_ms
from hf_slim.workflows.plan import check_examples, describe_recipe
from hf_slim.workflows.report import build_report, write_report
from hf_slim.workflows.shrink_vocabulary import trim_
from hf_slim.workflows.stages import RunFolders, last_checkpoint, newest_checkpoint

logger = logging.getLogger(__name__)
IMPORTANCE_EXAMPLES = 32  # training examples on which the importance of a teacher's layers and groups is measured


@dataclass(frozen=True)
class Trained:
    """Results of training other than the model.

    Attributes:
        base: Folder of the model that the result is compared with.
        layers: Scheme, and removed groups, of each layer.
        log: The Trainer's log; in a recipe with stages every entry has the number of its stage.
        notes: Remarks that a reader of the comparison needs.
        base_is_judged: Whether the quality of the base is measured; not if its head was never trained.
        base_is_tuned: Whether the base was fine-tuned on the data, in an earlier stage.
    """

    base: str
    layers: list[dict[str, Any]]
    log: list[dict[str, Any]]
    notes: list[str]
    base_is_judged: bool
    base_is_tuned: bool = False


@dataclass(frozen=True)
class RunInputs:
    """Inputs of one stage, other than its model.

    Attributes:
        folder: Folder of the Trainer's checkpoints.
        checkpoint: Checkpoint to resume from, if any.
        whole: The model that the stage's student was cut from; the model itself if the stage has no student.
    """

    folder: Path
    checkpoint: str | None
    whole: PreTrainedModel


@reading_once()
def run(recipe: Recipe | str | Path, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Trains, saves and measures the model of a recipe: `hf-slim train`.

    Args:
        recipe: A recipe, or the path of one; `load_recipe(path, ["training.max_steps=20"])` replaces values of it.
        overwrite: Replace a finished model in the output folder, once the new one is complete.
        resume: Continue from the last complete checkpoint of an interrupted run, or from its last finished stage.
    Returns: the report, which is also written to the output folder as JSON, Markdown and PNG.
    Raises: SlimError: for every error that can be found before training.
    """
    recipe = Recipe.of(recipe)
    output = Path(recipe.output)
    check_output(output, overwrite)
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as scratch:
        folders = RunFolders(recipe, Path(scratch))
        if not resume:
            folders.restart(overwrite)
        if recipe.stages:
            logger.info("Checking every stage.")
            describe_recipe(recipe)  # finds errors of later stages before the first one is trained for hours
        trained = train_stages(recipe, folders, resume)
        data = recipe.runs[-1].data
        _, held_out = load_texts(data, TASKS[recipe.task].columns(data))  # not what training has read
        measured = compare(recipe.task, trained.base, str(output), held_out, data, recipe.evaluation)
        if not trained.base_is_judged:
            measured["base"]["quality"] = {}
        compressing = [stage for stage in recipe.runs if stage.techniques]
        if compressing:
            for side, steps in training_step_ms(trained.base, compressing[-1]).items():
                measured[side]["training"] = {"step_ms": steps}
        folders.clear()
    report = build_report(recipe, measured, trained.layers, trained.log, trained.notes)
    report["base_is_tuned"] = trained.base_is_tuned
    write_report(report, output)
    return report


@reading_once()
def train_stages(recipe: Recipe, folders: RunFolders, resume: bool = False) -> Trained:
    """Runs every stage that is not finished and saves the model of the last one to the output; measures nothing.

    Args:
        folders: Folders of checkpoints, of the models of finished stages, and of the base.
        resume: Continue after the last finished stage, from its last complete checkpoint.
    Returns: the inputs of a comparison of the result with the base.
    """
    task, finished = TASKS[recipe.task], folders.finished() if resume else 0
    model, tokenizer, has_fresh_head = load_base(recipe)
    save(model, tokenizer, folders.scratch / "base")
    if finished:
        model, tokenizer = folders.load(finished, task.auto_class)
    elif recipe.vocabulary is not None:
        tokenizer = trim_vocabulary(recipe, model, tokenizer, folders.scratch / "trimmed")
    log = [{"stage": number, **entry} for number in range(1, finished + 1) for entry in folders.log(number)]
    layers: list[dict[str, Any]] = []
    for number, stage in list(enumerate(recipe.runs, 1))[finished:]:
        whole = model
        if stage.student is not None:
            model = make_student(whole, stage.student, importance_batches(stage, whole, tokenizer))
        layers = layers_of(model, stage.techniques)
        techniques = ", ".join(stage.techniques) or "fine-tuning"
        logger.info("Training stage %d of %d: %s.", number, len(recipe.runs), techniques)
        checkpoint = None
        if resume and number == finished + 1:  # a stage after the first may have no checkpoint yet
            checkpoint = (newest_checkpoint if finished else last_checkpoint)(folders.checkpoints(number))
        entries = _run_stage(stage, model, tokenizer, RunInputs(folders.checkpoints(number), checkpoint, whole))
        del whole
        log += [{"stage": number, **entry} for entry in entries] if recipe.stages else entries
        if number < len(recipe.runs):
            folders.keep(number, model, tokenizer, entries)
    logger.info("Saving the model to '%s'.", recipe.output)
    publish(model, tokenizer, Path(recipe.output))
    del model
    _return_memory()
    return _trained(recipe, folders, has_fresh_head, layers, log)


def load_base(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The model, its tokenizer, and whether the model has a new head with random weights."""
    task, first = TASKS[recipe.task], recipe.runs[0]
    train, _ = load_texts(first.data, task.columns(first.data))
    label_names = task.label_names(train, first.data)
    logger.info("Loading the model '%s'.", recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    set_seed(first.training_arguments(recipe.output).seed)  # a new head has random weights
    model = load_model(recipe.model, auto_class=task.auto_class, label_names=label_names)
    task.configure_(model, tokenizer)
    for stage in recipe.runs:
        check_examples(stage, model, tokenizer)
    return model, tokenizer, label_names is not None and lacks_head(recipe.model, task.auto_class)


def trim_vocabulary(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scratch: Path
) -> PreTrainedTokenizerBase:
    """Removes the tokens that no stage's data uses. Returns the smaller tokenizer, after `check_agreement`."""
    logger.info("Removing the tokens that the data never uses.")
    smaller, check, _ = trim_(model, tokenizer, [stage.data for stage in recipe.runs], recipe.vocabulary.round_to)
    save(model, smaller, scratch)
    check(scratch)
    return smaller


def _run_stage(
    stage: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: RunInputs
) -> list[dict[str, Any]]:
    """Trains the model in place and converts it to its final form. Returns the Trainer's log."""
    task, args = TASKS[stage.task], stage.training_arguments(str(inputs.folder))
    own_teacher = inputs.whole if inputs.whole is not model else None
    examples = training_examples(stage, tokenizer, model.config.label2id, args)
    try:
        trainer = trainer_for(
            model, args, task.loss_counts_items, train_dataset=examples, data_collator=task.collator(tokenizer),
            processing_class=tokenizer, callbacks=callbacks_for(list(stage.techniques.values()), own_teacher),
        )  # fmt: skip
    except SlimError:
        if inputs.folder.is_dir() and not any(inputs.folder.iterdir()):
            inputs.folder.rmdir()  # the Trainer creates it before a callback can raise an error
        raise
    if not progress_is_shown():
        trainer.remove_callback(PrinterCallback)  # prints every log entry if the progress bar is disabled
    trainer.train(resume_from_checkpoint=inputs.checkpoint)
    _release_(model)
    return trainer.state.log_history


def importance_batches(
    stage: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]] | None:
    """Batches of one training example each, to measure which layers and groups of a teacher are most important.

    Returns: keyword arguments of forward passes; None if the student is not chosen by importance.
    """
    if not stage.student.is_scored:
        return None
    args = stage.training_arguments(stage.output)
    examples = training_examples(stage, tokenizer, model.config.label2id, args)
    collate = TASKS[stage.task].collator(tokenizer)
    return [collate([examples[index]]) for index in range(min(len(examples), IMPORTANCE_EXAMPLES))]


def training_examples(
    stage: Recipe, tokenizer: PreTrainedTokenizerBase, label2id: dict[str, int], args: transformers.TrainingArguments
) -> Dataset:
    """The tokenized examples that a stage is trained on."""
    task = TASKS[stage.task]
    texts, _ = load_texts(stage.data, task.columns(stage.data))
    return task.examples(texts, tokenizer, label2id, stage.data, _examples_needed(args), args.seed)


def _release_(model: PreTrainedModel) -> None:
    """Removes the mixed-precision wrapper that a Trainer puts around the model, and accelerate's mark on the model.

    A model with this mark is not wrapped again, so the next stage would not train in its own precision.
    """
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model.__dict__.pop("_is_accelerate_prepared", None)


def _trained(
    recipe: Recipe, folders: RunFolders, has_fresh_head: bool, layers: list[dict], log: list[dict]
) -> Trained:
    """Chooses the base: the original model, or, if that has a new head, the model that was only fine-tuned."""
    untouched = str(folders.scratch / "base")
    if not has_fresh_head:
        return Trained(untouched, layers, log, [], base_is_judged=True)
    plain = next((number for number, stage in enumerate(recipe.runs) if stage.techniques), 0)
    if plain:
        note = f"The base is the model after stage {plain}, which was only fine-tuned. Later stages start from it."
        return Trained(str(folders.model(plain)), layers, log, [note], base_is_judged=True, base_is_tuned=True)
    data = recipe.runs[-1].data
    labels = Counter(load_texts(data)[1][data.label_column])
    chance = max(labels.values()) / labels.total()
    note = (
        f"The base has a head that was never trained, so its quality was not measured; {chance:.2%} of the held-out "
        "examples have the most frequent label. To compare with a fine-tuned base, fine-tune in a first stage."
    )
    return Trained(untouched, layers, log, [note], base_is_judged=False)


def _return_memory() -> None:
    """Returns freed memory to the system, so that the processes that measure can use it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps gigabytes of freed tensors otherwise
    except (OSError, AttributeError):
        return  # a libc without this function


def _examples_needed(args: transformers.TrainingArguments) -> int:
    """Number of examples for all optimizer steps; at most 100,000 if `max_steps` is not set."""
    if args.max_steps > 0:
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return 100_000
