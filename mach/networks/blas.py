"""The threads of numpy's products, which decide their bits, and which wait for work by turning in circles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def blas_threads(n: int) -> Iterator[None]:
    """Meanwhile, products of this process take so many threads, whatever its environment says."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(n, user_api="blas"):
        yield
