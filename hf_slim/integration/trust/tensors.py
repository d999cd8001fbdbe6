"""The tensors of a checkpoint against those of the model that its config builds, before memory is given to them."""

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_slim.core.contracts import PackedLayer, PreparedLayer
from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.header import StoredTensor
from hf_slim.core.files.json_file import shown
from hf_slim.core.files.model_folder import Weights

SPARE_BYTES = 16 * 2**20  # for what no file holds: position ids, rotary frequencies, a fresh head
MOST_PER_BYTE = 2  # of the files: float16 that becomes float32
DTYPES = {  # how a dtype is stored -> dtypes that it may become without loss
    "F16": {torch.float16, torch.float32}, "BF16": {torch.bfloat16, torch.float32}, "F32": {torch.float32},
    "I8": {torch.int8}, "I64": {torch.int64},
}  # fmt: skip
STORED = {  # how files name dtypes
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
NAMED = 3
OPTIONAL = ("pooler.",)  # parts of a base model that a checkpoint may lack


def check_tensors(model: nn.Module, conversions: list[Any], weights: Weights) -> None:
    """Compares what the files hold with the tensors that a compressed checkpoint's modules are about to receive.

    Args:
        model: As built from the config, with packed layers, its weights on the meta device.
        conversions: Between the names in the files and those in the model.
        weights: What the files hold.
    Raises: SlimLoadError: for a missing tensor, another shape or dtype, and for sizes that need far more memory than
        the files have.
    """
    expected: dict[str, Tensor] = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    found, made = _by_target(model, conversions, weights, expected)
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = [name for name in expected if name not in found and name not in made and name not in tied]
    exact, base = _of_quantized_layers(model), _BaseModel(model)
    if lost := [name for name in missing if name in exact or base.needs(name)]:
        _refuse(f"they lack {len(lost)} tensors: {', '.join(lost[:NAMED])}")
    for name, (stored, origin) in found.items():
        wanted = expected[name]
        if stored.shape != tuple(wanted.shape) and (name in exact or base.has(name)):
            _refuse(f"{shown(origin)} has shape {list(stored.shape)} there, and config.json says {list(wanted.shape)}")
        if name in exact and wanted.dtype not in DTYPES.get(stored.dtype, ()):
            _refuse(f"{shown(origin)} is {stored.dtype} there, and its scheme needs {str(wanted.dtype)[6:]}")
    resized = [name for name, (stored, _) in found.items() if stored.shape != tuple(expected[name].shape)]
    unsaved = [buffer for name, buffer in model.named_buffers() if name not in expected and buffer.is_meta]
    check_memory([*(expected[name] for name in missing + resized), *unsaved], weights)


def check_packed_tensors(model: Any, expected: dict[str, Tensor], weights: Weights) -> None:
    """Compares the packed layers of a folder in another format with what the format needs for these layers.

    Args:
        model: As built from the config; its layers may have other paths than in the file, by the base model's prefix.
        expected: Name in the file -> a tensor of that shape; integers of that dtype, floats of any.
    Raises: SlimLoadError: for a missing tensor, another shape or dtype.
    """
    prefix = f"{model.base_model_prefix}."
    origins = {
        name: next((one for one in (name, f"{prefix}{name}", name.removeprefix(prefix)) if one in weights.tensors), "")
        for name in expected
    }
    if lost := [name for name, origin in origins.items() if not origin]:
        _refuse(f"they lack {len(lost)} tensors: {', '.join(lost[:NAMED])}")
    for name, wanted in expected.items():
        origin = origins[name]
        stored = weights.tensors[origin]
        if stored.shape != tuple(wanted.shape):
            _refuse(f"{shown(origin)} has shape {list(stored.shape)} there, and config.json says {list(wanted.shape)}")
        held = STORED.get(stored.dtype)
        is_exact = wanted.dtype.is_floating_point and wanted.itemsize > 1
        if held is None or (not held.is_floating_point if is_exact else held != wanted.dtype):
            _refuse(f"{shown(origin)} is {stored.dtype} there, and its scheme needs {str(wanted.dtype)[6:]}")


def check_memory(tensors: Iterable[Tensor], weights: Weights) -> None:
    """Raises SlimLoadError if tensors that no file holds would take far more memory than the files."""
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    most = MOST_PER_BYTE * weights.size_bytes + SPARE_BYTES
    if size > most:
        _refuse(
            f"they hold {weights.size_bytes:,} bytes, and config.json asks for {size:,} more that no file holds; "
            f"allowed are {most:,}"
        )


def check_skeleton(skeleton: nn.Module, weights: Weights) -> None:
    """Raises SlimLoadError if an ordinary model has far more values than the files of its checkpoint.

    Args:
        skeleton: The model on the meta device.
    """
    size = sum(tensor.numel() for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    most = MOST_PER_BYTE * weights.numel + SPARE_BYTES
    if size > most:
        _refuse(
            f"they hold {weights.numel:,} values, and config.json describes a model of {size:,}; allowed are {most:,}"
        )


class _BaseModel:
    """Which tensors belong to the part that every checkpoint has; a head may be fresh, or of another size."""

    def __init__(self, model: Any):
        prefix = f"{model.base_model_prefix}."
        self.prefix = prefix if any(name.startswith(prefix) for name, _ in model.named_modules()) else ""
        self.ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]

    def has(self, name: str) -> bool:
        return name.startswith(self.prefix)

    def needs(self, name: str) -> bool:
        is_optional = name.removeprefix(self.prefix).startswith(OPTIONAL)
        return self.has(name) and not is_optional and not any(pattern.search(name) for pattern in self.ignored)


def _by_target(
    model: Any, conversions: list[Any], weights: Weights, expected: dict[str, Tensor]
) -> tuple[dict[str, tuple[StoredTensor, str]], set[str]]:
    """Tensors of the files by their name in the model, with that in the file; and names that conversions make."""
    conversions = copy.deepcopy(conversions)  # they note which of them were used
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    found: dict[str, tuple[StoredTensor, str]] = {}
    made: set[str] = set()
    for name in sorted(weights.tensors):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        if pattern is not None:
            converter = next(one for one in converters if pattern in one.source_patterns)
            first, *_ = patterns = converter.target_patterns
            made |= {target, *(target.replace(first, other) for other in patterns)}
        elif target in expected:
            found[target] = (weights.tensors[name], name)
    return found, made


def _of_quantized_layers(model: nn.Module) -> set[str]:
    """Names of the tensors that must be in the file exactly as they are: codes, scales, zero points and codebooks."""
    return {f"{path}.{name}".lstrip(".") for path, module in model.named_modules() for name in _exact_names(module)}


def _exact_names(module: nn.Module) -> Iterator[str]:
    if isinstance(module, PackedLayer):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.dtype == torch.int8 or name.endswith(("_scale", "_zero_point", "_codebook")):
                yield name
    elif isinstance(module, PreparedLayer):
        inner = ((path, part) for path, part in module.named_modules() if "_quantizer" in path)
        for path, part in inner:
            yield from (f"{path}.{name}" for name in part.state_dict())


def _refuse(why: str) -> NoReturn:
    raise SlimLoadError(
        f"The weights of this folder do not fit its config.json: {why}. The folder is damaged, or was changed by "
        "hand. Fetch or make it again."
    )
