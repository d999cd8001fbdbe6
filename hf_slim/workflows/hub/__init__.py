"""Sharing a model: its card, and the upload to the Hugging Face Hub."""
