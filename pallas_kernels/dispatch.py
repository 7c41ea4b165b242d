"""Checks at the public border: dimensions by letter, implementation by name."""

from collections.abc import Collection, Mapping
from typing import Literal

import jax

from pallas_kernels import compat

Implementation = Literal["reference", "xla", "triton", "mosaic_tpu"]

_PLATFORMS = {"triton": "gpu", "mosaic_tpu": "tpu"}  # of the Pallas kernels
_NAMES = ("reference", "xla", *_PLATFORMS)
_LONGEST = 2**31 - 1


def resolve(
    implementation: Implementation | None,
    available: Collection[str],
    *,
    interpret: bool = False,
    misfits: Mapping[str, str] | None = None,
) -> Implementation:
    """The implementation that will run.

    None picks the best one for the platform: "triton" on a GPU and "mosaic_tpu" on a TPU, where the
    operation has such a kernel and it takes the arguments, else "xla". A name is never replaced by
    another.

    Args:
      implementation: a name or None.
      available: the names that the operation has.
      interpret: whether Pallas kernels run in the interpreter, on any platform.
      misfits: {implementation: why its kernels do not take the arguments}, see `limits`; without
        those that do.

    Raises:
      ValueError: the name is unknown, or its kernels need another platform or other arguments.
      NotImplementedError: the name is known but the operation has no kernel of it.
    """
    usable = set(available) - set(misfits or ())
    if implementation is None:
        here = compat.platform()
        return next((name for name in usable if _PLATFORMS.get(name) == here), "xla")
    if implementation not in _NAMES:
        raise ValueError(f"{implementation=} is unknown; use one of {_NAMES} or None")
    if implementation not in available:
        raise NotImplementedError(
            f"{implementation=} has no kernel here; use one of {tuple(available)} or None"
        )
    if implementation in _PLATFORMS and not interpret:
        needed, platform = _PLATFORMS[implementation], compat.platform()
        if platform != needed:
            raise ValueError(
                f"{implementation=} runs on a {needed.upper()} and the platform is {platform!r}; "
                "use implementation='xla', or interpret=True to run the kernels in the interpreter"
            )
    if implementation not in usable:
        raise ValueError(misfits[implementation])
    return implementation


def settings(name: Implementation, interpret: bool) -> dict[str, bool]:
    """The keyword arguments that only the functions of a Pallas implementation take."""
    return {"interpret": interpret} if name in _PLATFORMS else {}


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
