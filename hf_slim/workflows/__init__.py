"""One file per thing that a command does, callable from Python."""
