"""Files of other minds: opened, parsed and typed in one way, so that each gives what the code expects or one error."""
