"""What a model is trained and measured for: one task per file."""
