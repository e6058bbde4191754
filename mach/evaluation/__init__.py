"""Evaluation: accuracy, predictions and the report of a run."""
