"""The functions behind the commands, one command per file, callable from Python."""
