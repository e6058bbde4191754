"""Compiled kernels, each tested against a plain numpy oracle."""
