"""Training: from a configuration to a finished run, on one machine or a cluster."""
