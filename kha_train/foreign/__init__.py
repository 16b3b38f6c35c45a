"""Files written by other programs or releases, read in one way: each gives what the code expects, or one error."""
