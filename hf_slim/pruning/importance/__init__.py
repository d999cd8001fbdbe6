"""How much every group matters."""
