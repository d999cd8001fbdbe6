"""Every private or fragile name of a host library that hf_slim uses. `tests/test_upstream.py` checks each."""

from hf_slim.integration.upstream.row import Check, Upstream
from hf_slim.integration.upstream.table import TABLE

__all__ = ["TABLE", "Check", "Upstream"]
