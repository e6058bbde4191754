"""The model: exact top-k answers, probabilities, and classes that are edited."""
