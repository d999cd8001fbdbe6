"""How a packed model is written: one format of folder a file."""
