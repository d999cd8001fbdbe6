"""Targets whose files hold a graph of operators, traced by the exporters of transformers."""
