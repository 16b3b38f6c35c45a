"""Kernel PCA and the Kernel Hebbian Algorithm, apart from the analyses of runs: they share only letters with KHA."""
