"""One file per command: it parses options, calls the package and prints the result."""
