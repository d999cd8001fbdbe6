"""Kernels of packed layers, one device per file."""
