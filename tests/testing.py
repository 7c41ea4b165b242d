"""How close is close enough: the one table of tolerances, and the comparison that uses it."""

import numpy as np

# Of the error: relative to the RMS of what is wanted, plus rounding noise where that is exactly 0.
REL_RMS = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}
FLOOR_RMS = {"float32": 1e-6, "float16": 4e-4, "bfloat16": 2e-3}
# Multiples of both, as `factor`: of kernels over ranges of keys, and of those over chosen blocks.
RANGE_KERNELS = {"float32": 5.0, "float16": 1.0, "bfloat16": 0.5}
SELECTED_KERNELS = 0.5


def assert_close(name, got, want, *, dtype="float32", factor=1.0):
    """Fails unless `got` is finite and within the tolerance of its dtype from `want`.

    Args:
      name: what is compared, for the message.
      got: array under test.
      want: array of the same shape and of order one; compared in float64.
      dtype: what was computed in, a key of `REL_RMS` as a name or a dtype.
      factor: multiple of the tolerance, for a stated reason.
    """
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    assert got.shape == want.shape, f"{name}: shape {got.shape}, want {want.shape}"
    wrong = np.count_nonzero(~np.isfinite(got))
    assert not wrong, f"{name}: {wrong} of {got.size} values are not finite"
    if not got.size:
        return
    dtype = np.dtype(dtype).name
    error, scale = (float(np.sqrt(np.mean(x**2))) for x in (got - want, want))
    limit = factor * (REL_RMS[dtype] * scale + FLOOR_RMS[dtype])
    worst = np.abs(got - want).max()
    assert error <= limit, f"{name}: RMS error {error:.2e} > {limit:.2e}, largest {worst:.2e}"


def largest_array(jaxpr):
    """Elements of the largest array that a jaxpr, or a jaxpr inside of it, computes."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one; newer JAX has it on both kinds
    largest = 0
    for equation in jaxpr.eqns:
        values = [x if isinstance(x, tuple) else (x,) for x in equation.params.values()]
        inner = [x for value in values for x in value if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
        sizes = [var.aval.size for var in equation.outvars]
        largest = max([largest, *sizes, *map(largest_array, inner)])
    return largest
