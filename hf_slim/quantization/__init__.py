"""Quantization-aware training: a fake-quantized forward in training, the same values packed afterwards."""

from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.scheme import SCHEMES, Scheme

__all__ = ["SCHEMES", "Grid", "QuantizationConfig", "Scheme"]
