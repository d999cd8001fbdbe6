"""Distillation: the student also learns what a teacher model answers."""

from hf_slim.distillation.config import DistillationConfig

__all__ = ["DistillationConfig"]
