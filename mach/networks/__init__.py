"""Networks of one repetition: training in torch over numba kernels, inference in plain numpy."""
