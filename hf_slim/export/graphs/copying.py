"""A shallow copy of a model in which layers are replaced: the model itself is left alone, and no tensor is copied."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

Replace = Callable[[str, nn.Module], nn.Module | None]
FOREIGN = ("hf_quantizer", "quantization_method")  # what transformers asks a quantized model for


def with_layers_replaced(
    model: PreTrainedModel, replace: Replace, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model as an ordinary one on the CPU, for a tracer: no quantizer, and the layers that `replace` gives.

    Args:
        replace: `(path, module)` -> the module for its place, or None to keep a copy of the module.
        dtype: Of all floating-point tensors; None: as they are.
    Returns: a model that shares its tensors with `model`, but for those that had to be cast or moved.
    """
    return _Copying(replace, dtype).of(model)


class _Copying:
    def __init__(self, replace: Replace, dtype: torch.dtype | None):
        self.replace, self.dtype = replace, dtype
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.configs: dict[
            int, Any
        ] = {}  # also the memo of `copy.deepcopy`: a config within another one is one object

    def of(self, model: PreTrainedModel) -> PreTrainedModel:
        self._config(model.config)
        found: Any = self._module("", model)
        for name in FOREIGN:
            vars(found).pop(name, None)
        found.is_quantized = False
        return found

    def _module(self, path: str, module: nn.Module) -> nn.Module:
        if id(module) not in self.modules:
            replaced = self.replace(path, module)
            self.modules[id(module)] = self._copy(path, module) if replaced is None else replaced
        return self.modules[id(module)]

    def _copy(self, path: str, module: nn.Module) -> nn.Module:
        twin = copy.copy(module)
        for name in ("_parameters", "_buffers"):
            vars(twin)[name] = {key: self._tensor(value) for key, value in vars(module)[name].items()}
        start = f"{path}." if path else ""
        vars(twin)["_modules"] = {
            name: None if child is None else self._module(f"{start}{name}", child)
            for name, child in module._modules.items()
        }
        for name, value in vars(module).items():
            if isinstance(value, PretrainedConfig):
                vars(twin)[name] = self._config(value)
            elif name == "dtype" and self.dtype is not None:
                vars(twin)[name] = self.dtype  # what a packed layer gives out
        return twin

    def _tensor(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self.tensors:
            dtype = self.dtype if tensor.is_floating_point() else None
            moved = tensor.detach().to("cpu", dtype)
            is_same = moved.data_ptr() == tensor.data_ptr() and moved.dtype == tensor.dtype
            if not is_same and isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, requires_grad=False)
            self.tensors[id(tensor)] = tensor if is_same else moved
        return self.tensors[id(tensor)]

    def _config(self, config: Any) -> Any:
        if id(config) not in self.configs:
            twin = copy.deepcopy(config, self.configs)
            vars(twin).pop("quantization_config", None)
            for part in (twin, *(value for value in vars(twin).values() if isinstance(value, PretrainedConfig))):
                part.dtype = self.dtype or part.dtype
        return self.configs[id(config)]
