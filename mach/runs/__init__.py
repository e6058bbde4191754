"""Trained runs at work: their repetitions, wherever the weights are, as one ensemble."""
