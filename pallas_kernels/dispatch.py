"""Checks at the public border: dimensions by letter, implementation by name."""

from collections.abc import Collection

import jax

from pallas_kernels import compat
from pallas_kernels.backends import BACKENDS, Backend
from pallas_kernels.block_sizes.supported import Call

REFERENCE = "reference"  # the formula of each operation in its `ref.py`: no kernels, no `Backend`
_LONGEST = 2**31 - 1


def resolve(implementation: str | None, call: Call, *, interpret: bool = False) -> Backend:
    """The backend that will run, chosen once per operation.

    None takes the first of `BACKENDS` that runs on the platform and supports the call and its
    gradients, whether or not they will be asked for. A name is never replaced by another.

    Args:
      implementation: a name or None.
      call: what is asked of the kernels.
      interpret: whether Pallas kernels run in the interpreter, on any platform.

    Raises:
      ValueError: the name is unknown, or its kernels need another platform or other arguments.
      NotImplementedError: it is "reference", which has no kernels.
    """
    here = compat.platform()
    if implementation is None:
        return next(x for x in BACKENDS if x.platform in (None, here) and x.supports(call))
    check_name(implementation, [x.name for x in BACKENDS])
    backend = next(x for x in BACKENDS if x.name == implementation)
    if backend.platform not in (None, here) and not interpret:
        raise ValueError(
            f"{implementation=} runs on a {backend.platform.upper()} and the platform is {here!r}; "
            "use implementation='xla', or interpret=True to run the kernels in the interpreter"
        )
    if (reason := backend.unsupported_reason(call, backward=False)) is not None:
        raise ValueError(reason)
    return backend


def check_name(implementation: str, available: Collection[str]) -> None:
    """Raises ValueError for an unknown name, NotImplementedError for one that is not available."""
    names = REFERENCE, *(x.name for x in BACKENDS)
    if implementation not in names:
        raise ValueError(f"{implementation=} is unknown; use one of {names} or None")
    if implementation not in available:
        raise NotImplementedError(
            f"{implementation=} has no kernel here; use one of {tuple(available)} or None"
        )


def bind_dims(**arrays: tuple[jax.Array, str]) -> dict[str, int]:
    """Binds one letter per dimension across arguments: `bind_dims(q=(q, "b s n h"), ...)`.

    A number in place of a letter is a fixed size.

    Returns:
      The size of every letter.

    Raises:
      ValueError: a rank is wrong, or one letter would have two sizes; names the argument.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (array, dims) in arrays.items():
        letters = dims.split()
        if array.ndim != len(letters):
            raise ValueError(f"{name} must be [{dims}], got shape {array.shape}")
        for letter, size in zip(letters, array.shape, strict=True):
            want = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != want:
                source = f" of {owner[letter]}" if letter in owner else ""
                raise ValueError(
                    f"{name} must be [{dims}] with {letter}={want}{source}, got shape {array.shape}"
                )
            owner.setdefault(letter, name)
    return {letter: size for letter, size in sizes.items() if not letter.isdigit()}


def bind_attention(**arrays: tuple[jax.Array, str]) -> dict[str, int]:
    """`bind_dims` for grouped-query attention; adds g = n // k.

    Raises:
      ValueError: as `bind_dims`, or a dimension is 0 or beyond int32, or the query heads are not a
        multiple of the KV heads.
    """
    sizes = bind_dims(**arrays)
    if empty := [letter for letter, size in sizes.items() if not size]:
        raise ValueError(f"attention needs every dimension to be at least 1; {empty} are 0")
    if long := {letter: size for letter, size in sizes.items() if size > _LONGEST}:
        raise ValueError(f"{long} exceed int32, which holds positions; the most is {_LONGEST}")
    if sizes["n"] % sizes["k"]:
        raise ValueError(f"{sizes['n']} query heads are not a multiple of {sizes['k']} KV heads")
    return sizes | {"g": sizes["n"] // sizes["k"]}
