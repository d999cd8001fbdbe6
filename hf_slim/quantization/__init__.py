"""Quantization-aware training: a fake-quantized forward in training, the same values packed afterwards."""

from hf_slim.quantization.config import SCHEMES, QuantizationConfig, Scheme

__all__ = ["SCHEMES", "QuantizationConfig", "Scheme"]
