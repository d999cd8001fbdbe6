"""The target `torch_export`: a `.pt2` file that torch loads and runs without hf_slim."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import DynamoConfig, DynamoExporter, ExportedModel

from hf_slim.core.contracts import PackedLayer
from hf_slim.core.errors import SlimError
from hf_slim.export.codes import is_packed_weight, weights_of
from hf_slim.export.exporter import EXPORTERS, ExportConfig, Exporter, Verification
from hf_slim.export.graphs.comparing import compared
from hf_slim.export.graphs.copying import with_layers_replaced
from hf_slim.export.graphs.interface import example, interface_from, interface_of, refusal_of
from hf_slim.export.graphs.rounding import round_inputs_, rounded, static_state
from hf_slim.export.graphs.tracing import save_exported, traced
from hf_slim.quantization.kernels.cpu import KERNELS
from hf_slim.quantization.layers.packed import PackedEmbedding, PackedLinear

FILE = "model.pt2"
ANY_SIZE = ("int8",)  # kernels whose choice does not depend on the number of tokens, which a graph leaves open


class TorchExporter(Exporter):
    """A program of torch's own operators: codes stay packed, and are computed with as hf_slim does."""

    title = "a .pt2 program for PyTorch without hf_slim"

    def refusal(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: ExportConfig) -> str:
        """Why this model has no graph; "" if it has one."""
        return refusal_of(model, tokenizer)

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, config: ExportConfig
    ) -> Path:
        """Writes `model.pt2`, its `export.json`, the config and the tokenizer."""
        interface = interface_of(model, tokenizer)
        inputs = example(model, interface)
        exported = traced(DynamoExporter, traceable(model), inputs, DynamoConfig)
        exported.program.example_inputs = None  # would be pickled, and warns when it is read
        _allow_few_tokens_(exported.program)
        save_exported(exported, model, tokenizer, folder)
        return folder / FILE

    def verify(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, config: ExportConfig
    ) -> Verification:
        """Loads the program, compares every tensor in it with the model's, and runs both."""
        exported = ExportedModel.from_pretrained(path.parent)
        component = exported.components["model"]
        tensors, values = _equal_tensors(model, component.program)
        interface = interface_from(component.metadata.kwargs, model)
        reference = with_layers_replaced(model, lambda name, module: None)  # on the CPU, as the program is
        found = compared(reference, lambda inputs: exported(**inputs), interface)
        return Verification(tensors, values, runs=found.as_runs(), notes=_notes(model))

    def command(self, path: Path) -> str:
        """How Python loads the program."""
        return (
            'python -c "from transformers.exporters import ExportedModel; '
            f"model = ExportedModel.from_pretrained('{path.parent}')\""
        )


class _TracedLinear(PackedLinear):
    """A packed layer that computes in the same way for any number of tokens."""

    def forward(self, input: Tensor) -> Tensor:
        for kernel in KERNELS:
            if kernel.name in ANY_SIZE and kernel.fits(self, input):
                return kernel.run(self, input)
        grid = self.scheme.activations
        if grid is not None:
            input = rounded(input, grid, (-1,), static_state(self, grid))
        return F.linear(input, self.dequantized(input.dtype), self.bias)


def traceable(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a packed model that a tracer can follow for any number of tokens."""
    twin = with_layers_replaced(model, lambda path, module: None)
    for module in twin.modules():
        if isinstance(module, PackedLinear):
            module.__class__, module.kernel_cache = _TracedLinear, None
        elif isinstance(module, PackedLayer) and not isinstance(module, PackedEmbedding) and module.scheme.activations:
            round_inputs_(module, module.scheme.activations)
    return twin


def _allow_few_tokens_(program: Any) -> None:
    """Lets every size be as small as 1: the least sum of cached and new tokens, each at least 2, is taken for 4."""
    for symbol, bounds in program.range_constraints.items():
        if bounds.lower > 2:  # 2 stands for "any" already
            program.range_constraints[symbol] = type(bounds)(2, bounds.upper)


def _equal_tensors(model: PreTrainedModel, program: Any) -> tuple[int, int]:
    """Tensors and weights of the model that the program holds. Raises SlimError if one is not the same."""
    held = {**program.state_dict, **program.constants}
    tensors, values = 0, 0
    for path, owner in weights_of(model).items():
        for name in _stored_names(model, path):
            found = held.get(name)
            expected = _tensor(model, name).detach().cpu()
            if found is None and owner != path:
                continue  # a tied weight is held once
            if found is None or found.dtype != expected.dtype or not torch.equal(found, expected):
                raise SlimError(f"'{name}' of {FILE} is not that of the model. Nothing was written. Please report it.")
            tensors += 1
        if owner == path:
            values += _count(model, path)
    return tensors, values


def _stored_names(model: PreTrainedModel, path: str) -> list[str]:
    """The parameter, and for packed weights the buffers that belong to it."""
    module_name, _, name = path.rpartition(".")
    buffers = model.get_submodule(module_name)._buffers if is_packed_weight(model, path) else {}
    start = f"{module_name}." if module_name else ""
    return [path, *(f"{start}{key}" for key, value in buffers.items() if key.startswith(name) and value is not None)]


def _tensor(model: PreTrainedModel, name: str) -> Tensor:
    module_name, _, key = name.rpartition(".")
    module = model.get_submodule(module_name)
    return module._parameters[key] if key in module._parameters else module._buffers[key]


def _count(model: PreTrainedModel, path: str) -> int:
    module_name, _, name = path.rpartition(".")
    module = model.get_submodule(module_name)
    if is_packed_weight(model, path):
        return torch.Size(module.float_shape(name)).numel()
    return int(module._parameters[name].numel())


def _notes(model: PreTrainedModel) -> tuple[str, ...]:
    probe = torch.zeros(1)
    integers = any(
        isinstance(module, PackedLinear) and any(k.name in ANY_SIZE and k.fits(module, probe) for k in KERNELS)
        for module in model.modules()
    )
    if not integers:
        return ()
    return ("Its integer products (torch's `_int_mm`) are fast on CPUs with AVX-512, and slow on others.",)


EXPORTERS.register("torch_export")(TorchExporter())
