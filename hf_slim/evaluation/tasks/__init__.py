"""The tasks that a model can be trained and measured for, one per file."""
