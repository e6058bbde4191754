"""Runs: the directory of a run, its repetitions, and the ensemble that they are."""
