"""Commands that share a model."""
