"""The command line: parses arguments, calls a function of `workflows`, and prints the result."""
