"""Removes tokens that are never used: rows of the model, and entries of the tokenizer's files."""
