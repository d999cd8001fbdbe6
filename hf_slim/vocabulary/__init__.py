"""Removing tokens that are never used: rows of the model, entries of the tokenizer's files."""
