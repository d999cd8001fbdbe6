"""Measuring: quality, memory, compute and speed of a base model and of what became of it."""
