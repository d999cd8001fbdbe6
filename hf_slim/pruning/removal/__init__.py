"""Masking groups while training, and cutting them out of the matrices at the end."""
