"""Grids: tensors in, tensors out."""
