"""What every technique shares. Stdlib and torch only."""
