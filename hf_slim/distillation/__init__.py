"""Distillation: a student model also learns from the outputs of a teacher model."""

from hf_slim.distillation.config import DistillationConfig

__all__ = ["DistillationConfig"]
