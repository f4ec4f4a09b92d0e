"""Matrix products in place by SciPy's BLAS, called without the interpreter's lock so that threads can share the work.

`scipy.linalg.blas` would hold the lock, and NumPy cannot add to what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, byref, c_char, c_float, c_int, c_void_p
from functools import cache

from numba.extending import get_cython_function_address

from rella.retrieval.measures import Floats


@cache
def _sgemm() -> Callable[..., None]:
    import scipy.linalg.cython_blas  # noqa: F401 - the address below is only there once it is loaded

    address = get_cython_function_address("scipy.linalg.cython_blas", "sgemm")
    return CFUNCTYPE(None, *[c_void_p] * 13)(address)


def add_products(rows: Floats, targets: Floats, vectors: Floats, start: int, stop: int) -> None:
    """Set (start = 0) or add to `rows` the products of dimensions [start, stop): targets[:, a:b] @ vectors[:, a:b].T.

    Args:
        rows: (T, I) float32, contiguous by rows; changed in place.
        targets: (T, d) float32, contiguous by rows.
        vectors: (I, d) float32, contiguous by rows.
        start: first dimension.
        stop: end of the dimensions.

    Raises:
        ValueError: shapes that do not fit, or memory that is not contiguous.
    """
    (count, d), (items, _) = targets.shape, vectors.shape
    fits = rows.shape == (count, items) and vectors.shape[1] == d and 0 <= start < stop <= d
    if not fits or not all(a.flags.c_contiguous and a.dtype == "float32" for a in (rows, targets, vectors)):
        raise ValueError(f"rows {rows.shape}, targets {targets.shape}, vectors {vectors.shape}, [{start}, {stop})")
    if not count or not items:
        return
    # BLAS counts in columns: what is (T, I) here is I × T there, and every matrix is seen transposed.
    m, n, k, lead, items_lead = c_int(items), c_int(count), c_int(stop - start), c_int(d), c_int(items)
    one, keep = c_float(1.0), c_float(float(start > 0))
    a, b = (c_void_p(matrix.ctypes.data + 4 * start) for matrix in (vectors, targets))
    _sgemm()(
        byref(c_char(b"T")), byref(c_char(b"N")), byref(m), byref(n), byref(k), byref(one), a, byref(lead), b,
        byref(lead), byref(keep), c_void_p(rows.ctypes.data), byref(items_lead),
    )  # fmt: skip
