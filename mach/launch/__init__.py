"""Launchers: they decide where a shard trains, and nothing else."""
