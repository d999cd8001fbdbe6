"""The target `openvino`: a graph for OpenVINO on CPUs, with the trained codes as constants of 4 and 8 bits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import ExportedModel, OpenVINOConfig, OpenVINOExporter

from hf_slim.core.errors import SlimError
from hf_slim.export.codes import weights_of
from hf_slim.export.exporter import EXPORTERS, ExportConfig, Exporter, Verification
from hf_slim.export.graphs.comparing import compared
from hf_slim.export.graphs.copying import with_layers_replaced
from hf_slim.export.graphs.interface import Interface, example, interface_from, interface_of, refusal_of
from hf_slim.export.graphs.onnx_layers import FloatLinear, float_embedding
from hf_slim.export.graphs.openvino_layers import GroupEmbedding, GroupLinear
from hf_slim.export.graphs.stand_ins import FLOATS, GROUPS, Kit, StandIns, forms_of, matrix_of, notes_on
from hf_slim.export.graphs.tracing import save_exported, traced

FILE = "openvino_model.xml"
KIT = Kit({GROUPS: GroupLinear, FLOATS: FloatLinear}, {GROUPS: GroupEmbedding, FLOATS: float_embedding})
# OpenVINO's own settings round activations, to bfloat16 and to 8 bits in blocks of 32
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class OpenVINOTarget(Exporter):
    """A graph for OpenVINO; that of a decoder keeps its cache itself, as OpenVINO GenAI expects."""

    title = "a graph for OpenVINO"
    packages = ("openvino",)
    extra = "openvino"

    def refusal(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: ExportConfig) -> str:
        """Why this model has no graph; "" if it has one. Every grid has a form, if only as floats."""
        return refusal_of(model, tokenizer)

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, config: ExportConfig
    ) -> Path:
        """Writes `openvino_model.xml` with its `.bin`, its `export.json`, the config and the tokenizer."""
        interface = interface_of(model, tokenizer)
        twin = with_layers_replaced(model, StandIns(model, KIT), torch.float32)
        inputs, stateful = example(model, interface), interface.cache is not None
        exported = traced(OpenVINOExporter, twin, inputs, OpenVINOConfig, stateful=stateful)
        held = _with_four_bits_(exported.program)
        save_exported(exported, model, tokenizer, folder)
        del held  # OpenVINO's tensors do not keep their memory alive
        return folder / FILE

    def verify(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, config: ExportConfig
    ) -> Verification:
        """Compares the codes in the file with the model's, then runs it in OpenVINO beside the model."""
        import openvino

        forms = forms_of(model, KIT)
        tensors, values = _equal_codes(model, forms, openvino.Core().read_model(path))
        exported = ExportedModel.from_pretrained(path.parent, device="cpu", config=EXACT)
        interface = interface_from(exported.components["model"].metadata.kwargs, model)
        reference = with_layers_replaced(model, lambda name, module: None, torch.float32)
        graph = _Graph(exported.runners["model"].compiled_model, interface)
        found = compared(reference, graph, interface)
        return Verification(tensors, values, runs=found.as_runs(), notes=(_settings_note(), *notes_on(model, forms)))

    def command(self, path: Path) -> str:
        """How Python compiles the graph, without OpenVINO's rounding."""
        return f"python -c \"import openvino; graph = openvino.Core().compile_model('{path}', 'CPU', {EXACT})\""


class _Graph:
    """A compiled graph that is called with a model's inputs; an empty cache among them starts a new text."""

    def __init__(self, compiled: Any, interface: Interface):
        self.request, self.interface = compiled.create_infer_request(), interface
        self.takes = {name for port in compiled.inputs for name in port.get_names()}
        self.gives = [next(iter(port.get_names())) for port in compiled.outputs]

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if inputs.get(self.interface.cache) is not None:
            self.request.reset_state()
        feed = {name: value.numpy() for name, value in inputs.items() if name in self.takes}
        if "beam_idx" in self.takes:
            feed["beam_idx"] = np.arange(len(feed["input_ids"]), dtype=np.int32)
        self.request.infer(feed)
        outputs = [torch.from_numpy(self.request.get_output_tensor(i).data.copy()) for i in range(len(self.gives))]
        return {**dict(zip(self.gives, outputs, strict=True)), 0: outputs[0]}


def _with_four_bits_(graph: Any) -> list[np.ndarray]:
    """Stores constants of signed bytes that all fit 4 bits in 4 bits, in place.

    Returns: the memory of the new constants, which must outlive the graph.
    """
    import openvino

    memory = []
    for constant in [op for op in graph.get_ordered_ops() if op.get_type_name() == "Constant"]:
        if constant.get_element_type() != openvino.Type.i8:
            continue
        codes = np.array(constant.data)
        if codes.size % 2 or codes.ndim < 2 or codes.min() < -8 or codes.max() > 7:
            continue
        pairs = codes.reshape(-1, 2).astype(np.uint8) & 15
        packed = pairs[:, 0] | pairs[:, 1] << 4
        memory.append(packed)
        tensor = openvino.Tensor(packed, openvino.Shape(codes.shape), openvino.Type.i4)
        replacement = openvino.op.Constant(tensor, shared_memory=False)
        replacement.set_friendly_name(constant.get_friendly_name())
        constant.output(0).replace(replacement.output(0))
    graph.validate_nodes_and_infer_types()
    return memory


def _equal_codes(model: PreTrainedModel, forms: dict[str, str], graph: Any) -> tuple[int, int]:
    """Weights whose codes the file holds, and their values. Raises SlimError if one is not there.

    OpenVINO names constants as it likes: every array of codes is looked for among all of them.
    """
    held = {_key(codes) for codes in _constants(graph)}
    tensors, values = 0, 0
    for path, owner in weights_of(model).items():
        if forms.get(path) != GROUPS or owner != path:
            continue
        codes = matrix_of(model, path, GROUPS).codes
        if _key(codes.numpy()) not in held:
            raise SlimError(f"{FILE} does not hold the codes of '{path}'. Nothing was written. Please report it.")
        tensors, values = tensors + 1, values + codes.numel()
    return tensors, values


def _key(codes: np.ndarray) -> tuple[int, bytes]:
    return codes.size, np.ascontiguousarray(codes).tobytes()


def _constants(graph: Any) -> list[np.ndarray]:
    """Every constant of whole numbers of 4 or 8 bits, as signed bytes."""
    import openvino

    found = []
    for constant in graph.get_ordered_ops():
        if constant.get_type_name() != "Constant":
            continue
        kind = constant.get_element_type()
        if kind == openvino.Type.i8:
            found.append(np.array(constant.data))
        elif kind == openvino.Type.i4:
            packed = np.array(constant.data).view(np.uint8).reshape(-1)
            found.append(np.stack((packed << 4, packed), axis=-1).view(np.int8).reshape(-1) >> 4)
    return found


def _settings_note() -> str:
    settings = ", ".join(f"{name}={value}" for name, value in EXACT.items())
    return (
        f"Compared with {settings}. OpenVINO's own settings are faster: they round what layers read to 8 bits in "
        "blocks of 32, and compute in bfloat16 where the CPU can, so outputs differ slightly."
    )


EXPORTERS.register("openvino")(OpenVINOTarget())
