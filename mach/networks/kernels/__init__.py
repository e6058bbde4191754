"""Compiled loops of a training step."""
