"""Markdown tables of the benchmarks' results; every function takes the loaded results and gives a table."""
