"""Reads files written by other programs or releases. Each reader returns what the code expects, or raises one error."""
