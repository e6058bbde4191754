"""A run's classes after training: added, removed, renamed and taught, version by version."""
