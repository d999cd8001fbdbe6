"""Teachers: loading, running, sharding and re-tokenizing for them, and reading stored ones."""
