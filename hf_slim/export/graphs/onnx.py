"""The target `onnx`: one graph for ONNX Runtime, with the trained codes in operators that compute with them."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

from hf_slim.core.errors import SlimError
from hf_slim.export.codes import float_values, weights_of
from hf_slim.export.exporter import EXPORTERS, ExportConfig, Exporter, Verification
from hf_slim.export.graphs.comparing import compared
from hf_slim.export.graphs.copying import with_layers_replaced
from hf_slim.export.graphs.interface import example, interface_from, interface_of, refusal_of
from hf_slim.export.graphs.matrices import Blocks, Integers, values_of
from hf_slim.export.graphs.onnx_layers import (
    BlockEmbedding,
    BlockLinear,
    FloatLinear,
    IntegerEmbedding,
    IntegerLinear,
    float_embedding,
)
from hf_slim.export.graphs.stand_ins import BLOCKS, FLOATS, INTEGERS, Kit, StandIns, forms_of, matrix_of, notes_on
from hf_slim.export.graphs.tracing import save_exported, traced

FILE = "model.onnx"
OPERATORS = {BLOCKS: "MatMulNBits", INTEGERS: "MatMulInteger"}
KIT = Kit(
    {INTEGERS: IntegerLinear, BLOCKS: BlockLinear, FLOATS: FloatLinear},
    {INTEGERS: IntegerEmbedding, BLOCKS: BlockEmbedding, FLOATS: float_embedding},
)


class OnnxRuntimeExporter(Exporter):
    """A graph for ONNX Runtime on CPUs, computed in float32."""

    title = "a graph for ONNX Runtime"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def refusal(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: ExportConfig) -> str:
        """Why this model has no graph; "" if it has one. Every grid has a form, if only as floats."""
        return refusal_of(model, tokenizer)

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, config: ExportConfig
    ) -> Path:
        """Writes `model.onnx` with `model.onnx.data`, its `export.json`, the config and the tokenizer."""
        inputs = example(model, interface_of(model, tokenizer))
        twin = with_layers_replaced(model, StandIns(model, KIT), torch.float32)
        save_exported(traced(OnnxExporter, twin, inputs, OnnxConfig), model, tokenizer, folder)
        return folder / FILE

    def verify(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, config: ExportConfig
    ) -> Verification:
        """Compares the codes in the file with the model's values, then runs it in ONNX Runtime beside the model."""
        forms = forms_of(model, KIT)
        tensors, values = _equal_weights(model, forms, _initializers(path))
        exported = ExportedModel.from_pretrained(path.parent, device="cpu")
        interface = interface_from(exported.components["model"].metadata.kwargs, model)
        reference = with_layers_replaced(model, lambda name, module: None, torch.float32)
        found = compared(reference, lambda inputs: exported(**inputs), interface)
        return Verification(tensors, values, runs=found.as_runs(), notes=_notes(model, forms))

    def command(self, path: Path) -> str:
        """How Python opens the graph."""
        return f"python -c \"import onnxruntime; session = onnxruntime.InferenceSession('{path}')\""


def _equal_weights(model: PreTrainedModel, forms: dict[str, str], held: dict[str, Tensor]) -> tuple[int, int]:
    """Tensors and weights of the model that the file holds. Raises SlimError if a value is not the model's.

    Packed weights must be there; of others only those are compared that the graph holds under their own name, and
    not transposed or folded into another.
    """
    tensors, values, missing = 0, 0, set()
    for path, owner in weights_of(model).items():
        found = _held_values(model, path, forms.get(path), held)
        if found is None:
            missing |= {owner} if path in forms and forms[path] != FLOATS else set()
            continue
        if not torch.equal(found, float_values(model, path).float()):
            raise SlimError(
                f"'{path}' of {FILE} has other values than the model. Nothing was written. Please report it."
            )
        tensors, values = tensors + 1, values + found.numel()
        missing.discard(owner)
    if missing:
        raise SlimError(f"{FILE} does not hold the codes of {', '.join(sorted(missing)[:3])}. Please report it.")
    return tensors, values


def _held_values(model: PreTrainedModel, path: str, form: str | None, held: dict[str, Tensor]) -> Tensor | None:
    """The values of a weight as the graph holds them; None if it has no tensor of this name."""
    if form is None or form == FLOATS:
        return held.get(path)
    start = path.removesuffix("weight")
    codes, scale = held.get(f"{start}codes"), held.get(f"{start}scale")
    if codes is None or scale is None:
        return None
    if form == INTEGERS:
        return values_of(Integers(codes, scale))
    like = matrix_of(model, path, BLOCKS)
    return values_of(Blocks(codes, scale, like.bits, like.block, like.columns))


def _initializers(path: Path) -> dict[str, Tensor]:
    """Every constant tensor of a graph by name, of the types that torch has."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    return {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}


def _notes(model: PreTrainedModel, forms: dict[str, str]) -> tuple[str, ...]:
    counts = {form: sum(one == form for one in forms.values()) for form in OPERATORS}
    exact = ", ".join(f"{count} as {OPERATORS[form]}" for form, count in counts.items() if count)
    notes = [f"Trained codes in the graph: {exact}."] if exact else []
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype != torch.float32:
        notes.append(f"The graph computes in float32; the model is in {str(dtype).removeprefix('torch.')}.")
    return (*notes, *notes_on(model, forms))


EXPORTERS.register("onnx")(OnnxRuntimeExporter())
