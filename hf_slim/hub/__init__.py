"""A model on the Hugging Face Hub: its card, which files of a folder belong to it, and the upload."""
