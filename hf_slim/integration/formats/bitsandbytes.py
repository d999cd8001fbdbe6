"""Folders of bitsandbytes: NF4 and FP4 in linear layers, as its `Linear4bit` saves them.

Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314; the layout of `bitsandbytes.functional.QuantState.as_dict`.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter

from hf_slim.core.host import is_transposed_linear
from hf_slim.integration.formats.codes import Layer, as_stored_codes, row_scales, stored_codes
from hf_slim.integration.formats.format import FORMATS, Candidate, SaveFormat, columns_of, reads
from hf_slim.integration.formats.gemma import converted_otherwise
from hf_slim.quantization.grids.packing import every_code
from hf_slim.quantization.scheme import Scheme

KINDS = ("nf4", "fp4")
GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # blocks that its kernels take
STATE = "weight.quant_state.bitsandbytes__"


class BitsAndBytesFormat(SaveFormat):
    """Linear layers and GPT-2's Conv1D on the grids NF4 or FP4; everything else stays in floating point."""

    name = "bitsandbytes"
    preference = 3
    holds = f"linear layers with nf4 or fp4, one of them, in groups of {', '.join(map(str, GROUP_SIZES))} inputs"
    read_by = "transformers with the package bitsandbytes"
    ignored = (r"\.weight\.quant_map$", r"\.weight\.quant_state\.bitsandbytes__")

    def layer_reason(self, scheme: Scheme, plain: nn.Module) -> str | None:
        """Why the format does not hold a layer; None: it does."""
        grid = scheme.weights
        if not _is_converted(plain):
            return f"is no linear layer ({type(plain).__name__})"
        if grid.kind not in KINDS or scheme.activations is not None or grid.scale is not None:
            return f"has the grid '{scheme}'"
        if grid.group_size not in GROUP_SIZES or columns_of(plain) % grid.group_size:
            return f"has groups of {grid.group_size or columns_of(plain)} in {columns_of(plain)} inputs"
        return None

    def model_reason(self, candidate: Candidate) -> str | None:
        """Two grids in one model, or names of layers that the loader would mistake for others."""
        if len({scheme.weights.kind for scheme in candidate.schemes.values()}) > 1:
            return "Layers have two grids, nf4 and fp4"
        return converted_otherwise(candidate, _kinds(candidate), _unconverted(candidate))

    def settings(self, candidate: Candidate, dtype: torch.dtype) -> dict[str, Any]:
        """The grid, and what is not converted."""
        return {
            "quant_method": self.name, "load_in_4bit": True, "load_in_8bit": False,
            "bnb_4bit_quant_type": next(iter(candidate.schemes.values())).weights.kind,
            "bnb_4bit_compute_dtype": _named(dtype), "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": _unconverted(candidate),
        }  # fmt: skip

    def tensors(self, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Codes, largest magnitudes, the values of the grid, and the state as bytes of JSON."""
        grid, shape = layer.scheme.weights, layer.float_shape("weight")
        codes = stored_codes(layer).reshape(-1, 2)
        state = {"quant_type": grid.kind, "blocksize": grid.group_size, "dtype": _named(dtype), "shape": list(shape)}
        values = grid.kind_of.decode(torch.arange(2**grid.bits, dtype=torch.uint8), grid, None)
        return {
            "weight": (codes[:, :1] << 4) | codes[:, 1:],  # the first code of two in the high bits
            "weight.absmax": row_scales(layer).view(-1), "weight.quant_map": values,
            STATE + grid.kind: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }  # fmt: skip

    def conversions(self) -> list[WeightConverter]:
        """How the tensors of a file become those of packed layers."""
        return [reads("weight.absmax", "weight_scale", _read_scales), reads("weight", "weight", _read_codes)]


FORMATS.register("bitsandbytes")(BitsAndBytesFormat())


def _is_converted(plain: nn.Module) -> bool:
    return type(plain) is nn.Linear or is_transposed_linear(plain)


def _kinds(candidate: Candidate) -> tuple[type[nn.Module], ...]:
    return tuple({type(module) for module in candidate.plain.modules() if _is_converted(module)})


def _unconverted(candidate: Candidate) -> list[str]:
    return candidate.unquantized(_kinds(candidate))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_scales(layer: Layer, scales: Tensor) -> Tensor:
    return scales.view(layer.float_shape("weight")[0], -1)


def _read_codes(layer: Layer, packed: Tensor) -> Tensor:
    both = every_code(4, packed.device)[packed.view(torch.uint8).view(-1).int()]  # the low one first
    codes = both.flip(1).reshape(layer.float_shape("weight"))
    return as_stored_codes(codes, layer.scheme.weights)
