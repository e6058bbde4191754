"""Compiled loops over rows and bytes."""
