"""The `from_pretrained` side: what was saved loads back with plain `AutoModel*.from_pretrained`."""
