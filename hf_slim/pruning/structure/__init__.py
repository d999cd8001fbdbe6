"""Finds the groups that can be removed from a model, and verifies each."""
