"""The version of hf_slim, in the one place that everything reads; folders have a format number of their own."""

__version__ = "0.3.0.dev0"
