"""Code that all techniques share. Needs only the standard library and torch."""
