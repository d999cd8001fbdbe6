"""A recipe from start to end: train with the callbacks, save, reload, measure, report."""

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
from hf_slim.workflows.plan import describe_recipe
from hf_slim.workflows.report import build_report, write_report
from hf_slim.workflows.shrink_vocabulary import texts_of, trim_
from hf_slim.workflows.stages import RunFolders, last_checkpoint, newest_checkpoint

logger = logging.getLogger(__name__)
IMPORTANCE_EXAMPLES = 32  # of the training data, which say what of a teacher its student needs most


@dataclass(frozen=True)
class Trained:
    """Results of training other than the model.

    Attributes:
        base: Folder of the model that the result is compared with.
        layers: What became of each layer.
        log: The Trainer's log; entries of a recipe with stages say which stage they are of.
        notes: What must be known to read the comparison.
        base_is_judged: Whether the base can do the task at all; one whose head was never trained cannot.
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
    """What one stage starts from, other than its model.

    Attributes:
        folder: For the Trainer's checkpoints.
        checkpoint: To go on from, if any.
        whole: The model that the stage's student was cut from, or the model itself.
    """

    folder: Path
    checkpoint: str | None
    whole: PreTrainedModel


@reading_once()
def run(recipe: Recipe | str | Path, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Trains, saves and measures what a recipe says: `hf-slim train`.

    Args:
        recipe: A recipe, or the path of one; `load_recipe(path, ["training.max_steps=20"])` replaces values of it.
        overwrite: Replace a finished model in the output folder, once the new one is complete.
        resume: Continue from the last complete checkpoint of an interrupted run, or from its last finished stage.
    Returns: the report, which is also written to the output folder as JSON, Markdown and PNG.
    Raises: SlimError: for anything that can be known before training.
    """
    recipe = Recipe.of(recipe)
    output = Path(recipe.output)
    check_output(output, overwrite)
    with tempfile.TemporaryDirectory(prefix="hf_slim-") as scratch:
        folders = RunFolders(recipe, Path(scratch))
        if not resume:
            folders.start_afresh(overwrite)
        if recipe.stages:
            logger.info("Checking every stage.")
            describe_recipe(recipe)  # a later stage would otherwise be refused after hours of the first
        trained = train_stages(recipe, folders, resume)
        measured = compare(recipe.task, trained.base, str(output), recipe.runs[-1].data, recipe.evaluation)
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
    """Runs every stage that is not finished and publishes the last one's model; nothing is measured.

    Args:
        folders: Where checkpoints, the models of finished stages and the base are kept.
        resume: Continue after the last finished stage, from its last complete checkpoint.
    Returns: what a comparison of the result with the base needs.
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
        if resume and number == finished + 1:  # a later stage may have been interrupted before its first checkpoint
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
    """Model, tokenizer, and whether the model's head is fresh."""
    task, first = TASKS[recipe.task], recipe.runs[0]
    train, _ = load_texts(first.data, task.columns(first.data))
    label_names = task.label_names(train, first.data)
    logger.info("Loading the model '%s'.", recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    set_seed(first.training_arguments(recipe.output).seed)  # a fresh head is random
    model = load_model(recipe.model, auto_class=task.auto_class, label_names=label_names)
    task.settle_(model, tokenizer)
    return model, tokenizer, label_names is not None and lacks_head(recipe.model, task.auto_class)


def trim_vocabulary(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scratch: Path
) -> PreTrainedTokenizerBase:
    """Removes what no stage's data uses from the model; returns its tokenizer, once both were loaded and compared."""
    logger.info("Removing the tokens that the data never uses.")
    texts = texts_of(*(stage.data for stage in recipe.runs))
    smaller, check, _ = trim_(model, tokenizer, texts, recipe.vocabulary.round_to)
    save(model, smaller, scratch)
    check(scratch)
    return smaller


def _run_stage(
    stage: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: RunInputs
) -> list[dict[str, Any]]:
    """Trains the model in place, its final form included. Returns the Trainer's log."""
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
            inputs.folder.rmdir()  # the Trainer makes it before callbacks can object
        raise
    if not progress_is_shown():
        trainer.remove_callback(PrinterCallback)  # the Trainer's other way to show each entry of its log
    trainer.train(resume_from_checkpoint=inputs.checkpoint)
    _release_(model)
    return trainer.state.log_history


def importance_batches(
    stage: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]] | None:
    """Batches of one training example each, for choosing what of a teacher its student keeps.

    Returns: keyword arguments of forward passes; None where the shape of the student is not chosen by importance.
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
    """Undoes what a Trainer has wrapped around the model for mixed precision, and forgets that it was.

    Otherwise accelerate takes the model as prepared, and the next stage would not train in the precision it asks for.
    """
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model.__dict__.pop("_is_accelerate_prepared", None)


def _trained(
    recipe: Recipe, folders: RunFolders, has_fresh_head: bool, layers: list[dict], log: list[dict]
) -> Trained:
    """Chooses the base: the untouched model, or where its head is fresh the model that was only fine-tuned."""
    untouched = str(folders.scratch / "base")
    if not has_fresh_head:
        return Trained(untouched, layers, log, [], base_is_judged=True)
    plain = next((number for number, stage in enumerate(recipe.runs) if stage.techniques), 0)
    if plain:
        note = f"The base is the model after stage {plain}: only fine-tuned. The result was trained on from there."
        return Trained(str(folders.model(plain)), layers, log, [note], base_is_judged=True, base_is_tuned=True)
    data = recipe.runs[-1].data
    labels = Counter(load_texts(data)[1][data.label_column])
    chance = max(labels.values()) / labels.total()
    note = (
        f"The base has a head that was never trained, so its quality was not measured; {chance:.2%} of the held-out "
        "examples have the commonest label. To compare with a fine-tuned base, fine-tune in a first stage."
    )
    return Trained(untouched, layers, log, [note], base_is_judged=False)


def _return_memory() -> None:
    """Gives what training used back to the system, so that it is there for the processes that measure."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps gigabytes of freed tensors otherwise
    except (OSError, AttributeError):
        return  # another libc: it has no such call


def _examples_needed(args: transformers.TrainingArguments) -> int:
    """Examples for every optimizer step, or for one epoch of at most 100,000 where no number of steps is given."""
    if args.max_steps > 0:
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return 100_000
