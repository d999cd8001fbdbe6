"""What every technique shares. Stdlib and torch only; one file, `progress`, shows bars with tqdm."""
