"""Compiled loops of the decoder (numba); the numpy that they must equal stands in `mach.sketch.decoder`."""
