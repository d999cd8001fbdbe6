"""Gradual structured pruning: groups of weights are masked during training and removed at the end."""

from hf_slim.pruning.config import PruningConfig

__all__ = ["PruningConfig"]
