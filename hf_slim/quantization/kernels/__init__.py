"""How packed layers compute, one device per file."""
