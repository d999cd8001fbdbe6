"""Layers in their training-time and packed forms."""
