"""Compiled loops over candidates."""
