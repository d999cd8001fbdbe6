"""Measures quality, memory, compute and speed of a base model and of its compressed form."""
