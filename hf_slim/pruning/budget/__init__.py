"""How much is removed, and which groups."""
