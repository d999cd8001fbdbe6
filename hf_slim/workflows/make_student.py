"""Makes a student from a saved teacher and saves it: `hf-slim make-student`."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimConfigError, SlimDataError, SlimError
from hf_slim.core.host import field_of
from hf_slim.data import DataConfig, load_texts, text_blocks
from hf_slim.evaluation.footprint import parameter_count
from hf_slim.evaluation.tasks import causal_lm, classification  # noqa: F401  registers the tasks
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.integration.loading import class_of, classes_for, load_model, load_skeleton, load_tokenizer
from hf_slim.integration.saving import check_output, publish
from hf_slim.pruning.structure.example_inputs import example_inputs
from hf_slim.pruning.structure.sizes import CONFIG_WIDTHS
from hf_slim.student.cut import choose_removed
from hf_slim.student.make import become_student_, check_data, fresh_student
from hf_slim.student.plan import plan_student
from hf_slim.student.shape import StudentShape
from hf_slim.student.structure import structure_of

logger = logging.getLogger(__name__)
BATCHES = 16
ROUNDING = 64  # units in the last place of the largest output: the memory layout may change the order of sums
LABELLED = 32  # texts in a batch of labelled data; a batch of text blocks has one
SIZES = {
    "layers": ("num_hidden_layers",), "decoder layers": ("num_decoder_layers", "decoder_layers"),
    "hidden width": ("hidden_size",), "query heads": ("num_attention_heads",),
    "key-value heads": ("num_key_value_heads",),
}  # fmt: skip


def save_student(
    spec: str,
    shape: StudentShape,
    output: Path,
    data: DataConfig | None = None,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Saves a student of a teacher, with the teacher's tokenizer, as an ordinary checkpoint: `hf-slim make-student`.

    The saved student is loaded again, and compared with the student in memory, before it is moved into place.

    Args:
        spec: A Hub id, a folder, or `package:<module>/<file>`.
        data: Text on which importance is measured; None: importance is computed from the weights.
    Returns: sizes "before" and "after", and the kept "layers", by the path of their stack.
    Raises: SlimError: for every error that can be found before weights are read, and if the outputs differ.
    """
    check_output(output, overwrite)
    model_class = class_of(spec)
    skeleton, tokenizer = load_skeleton(spec, model_class), load_tokenizer(spec)
    before = sizes_of(skeleton, dtype)
    structure = structure_of(skeleton, shape)
    cuts = plan_student(structure, shape)
    if not shape.fresh and all(cut.n_kept == cut.group_set.count for cut in cuts):
        raise SlimConfigError("Nothing to change: this shape is the teacher's. Set fewer layers or smaller widths.")
    check_data(cuts, shape, data is not None)
    torch.manual_seed(0)  # a fresh student is the same in every run
    if shape.fresh:
        student, removed = fresh_student(structure, cuts, shape).to(dtype), choose_removed(cuts, shape)
    else:
        logger.info("Loading the teacher '%s'.", spec)
        student = load_model(spec, dtype, model_class)
        batches = None if data is None else list(batches_of(student, tokenizer, data))
        removed = become_student_(student, structure, cuts, shape, batches)
    logger.info("Saving the student to '%s'.", output)
    publish(student.eval(), tokenizer, output, lambda folder: _check_saved(folder, student))
    stacks = (cut.group_set for cut in cuts if cut.group_set.stack)
    layers = {found.stack: [i for i in range(found.count) if i not in removed.get(found.name, ())] for found in stacks}
    return {"before": before, "after": sizes_of(student, dtype), "layers": layers}


def batches_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Iterator[dict[str, Tensor]]:
    """Batches of training text, with labels if the model has a head for a task with labels."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise SlimDataError(
            f"{name} needs pairs of source and target text, and this data has single texts. Leave the data out, or "
            "call `hf_slim.make_student(model, shape, batches)` with your own batches."
        )
    tasks = (TASKS[name] for name in TASKS if type(model) in classes_for(model.config, TASKS[name].auto_class))
    task = next(tasks, None)
    if task in (None, TASKS["causal-lm"]):
        blocks = text_blocks(load_texts(data)[0], tokenizer, data, BATCHES, 0, "reading text")
        names = ("input_ids",) if task is None else ("input_ids", "labels")
        yield from ({name: torch.tensor([block[name]]) for name in names} for block in blocks)
        return
    texts = load_texts(data, task.columns(data))[0]
    task.configure_(model, tokenizer)
    examples = task.examples(texts, tokenizer, model.config.label2id, data, BATCHES * LABELLED, 0)
    for start in range(0, len(examples), LABELLED):
        rows = examples.select(range(start, min(start + LABELLED, len(examples))))
        yield dict(task.collator(tokenizer)(list(rows)))


def sizes_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, int]:
    """Layers and widths as in the config, number of parameters, and their bytes in `dtype`."""
    config = model.config.get_text_config()
    values = {label: [field_of(config, name) for name in names] for label, names in SIZES.items()}
    values |= {name: [vars(config).get(name)] for name in CONFIG_WIDTHS}
    found = {label: next((value for value in held if isinstance(value, int)), None) for label, held in values.items()}
    parameters = parameter_count(model)
    sizes = found | {"parameters": parameters, "bytes": parameters * dtype.itemsize}
    return {label: value for label, value in sizes.items() if value is not None}


def as_table(report: dict[str, Any]) -> str:
    """The report of `save_student` as a table."""
    before, after = report["before"], report["after"]
    lines = [f"{'':<18} {'before':>12} {'after':>12} {'improvement':>12}"]
    for name in (name for name in before if name in after):
        unit, label = {"parameters": (1e6, "parameters (M)"), "bytes": (1e6, "size (MB)")}.get(name, (1, name))
        numbers = [f"{side[name] / unit:>12,.{0 if unit == 1 else 1}f}" for side in (before, after)]
        lines.append(f"{label:<18} {' '.join(numbers)} {before[name] / after[name]:>11.2f}x")
    kept = [f"Kept layers of {stack}: {', '.join(map(str, kept))}" for stack, kept in report["layers"].items()]
    return "\n".join([*lines, "", *kept]).rstrip()


@torch.inference_mode()
def _check_saved(folder: Path, student: PreTrainedModel) -> None:
    """Raises SlimError unless the folder is an ordinary checkpoint with the weights and outputs of the student."""
    loaded = load_model(str(folder), student.dtype, type(student))
    inputs = example_inputs(student)
    made, again = (next(iter(one(**inputs).values())) for one in (student, loaded))
    allowed = ROUNDING * torch.finfo(made.dtype).eps * made.abs().max().item()
    weights, others = student.state_dict(), loaded.state_dict()
    is_same = weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    if not is_same or not (again - made).abs().max().item() <= allowed:
        raise SlimError(f"The saved {type(student).__name__} is not equal to the student in memory. Please report it.")
