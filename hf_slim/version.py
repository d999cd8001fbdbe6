"""The version of hf_slim. All code reads it from here. The folder format has a separate number."""

__version__ = "0.3.0.dev0"
