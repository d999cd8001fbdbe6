"""Losses as functions of tensors: divergences of the outputs, hidden states, attention and regression."""
