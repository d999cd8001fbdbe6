"""Decides how much is removed, and which groups."""
