"""Data: readers of the field's formats, the memory-mapped store, text features, the embedded set."""
