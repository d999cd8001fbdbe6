"""Quantization grids, as functions of tensors."""
