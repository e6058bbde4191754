"""Compiled loops of heads (numba)."""
