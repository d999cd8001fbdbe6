"""Masks groups during training, and removes them from the matrices at the end."""
