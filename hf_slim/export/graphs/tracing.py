"""One call of an exporter of transformers, and the folder that it leaves: the graph, and what describes it."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import ExportedModel
from transformers.exporters.utils import get_leaf_tensors
from transformers.utils import logging as transformers_logging

from hf_slim.core.errors import SlimError


def traced(
    exporter: Any, model: PreTrainedModel, inputs: dict[str, Any], config: type, **settings: Any
) -> ExportedModel:
    """The graph of a model, for any number of rows and tokens.

    Args:
        exporter: One of `transformers.exporters`.
        config: The class of its config.
        settings: Of the config.
    Raises: SlimError: if the exporter fails; it knows many models, not all.
    """
    try:
        with torch.no_grad(), _quiet():
            shapes = {name: _open_sizes(value) for name, value in inputs.items() if not isinstance(value, bool)}
            return exporter().export(model, inputs, config(dynamic=True, dynamic_shapes=shapes, **settings))
    except Exception as error:
        first_lines = " ".join(str(error).split())[:300]
        raise SlimError(
            f"{exporter.__name__} of transformers could not trace {type(model).__name__} "
            f"({type(error).__name__}: {first_lines}). Nothing was written. If the model without hf_slim fails too, "
            "it is one that transformers cannot export."
        ) from error


def save_exported(
    exported: ExportedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Writes a graph as `ExportedModel.from_pretrained` reads it, with the files of generation and tokenizer."""
    if model.can_generate():
        exported.generation_config = model.generation_config
    exported.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _open_sizes(value: Any) -> Any:
    """Which dimensions of an input may have any size: rows and tokens, of images the rows.

    Without this all may, heads and their sizes too, which takes longer to trace and says less to who reads the graph.
    """
    auto = torch.export.Dim.AUTO
    if isinstance(value, Tensor):
        return {0: auto, 1: auto} if value.dim() == 2 else {0: auto}
    return [{0: auto, 2: auto} for _ in get_leaf_tensors(value)]  # keys and values of a cache


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about versions and about dynamic sizes, which we ask for; errors are still shown."""
    before = transformers_logging.get_verbosity()
    others = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in others]
    try:
        transformers_logging.set_verbosity_error()
        for one in others:
            one.setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()):  # torch.onnx prints its steps
            yield
    finally:
        transformers_logging.set_verbosity(before)
        for one, level in zip(others, levels, strict=True):
            one.setLevel(level)
