"""What can be removed from a model, and the proof of it."""
