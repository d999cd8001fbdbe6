"""The command line: parses arguments and prints; everything it does is a function of `workflows`."""
