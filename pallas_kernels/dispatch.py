"""Checks at the public border: dimensions by letter, implementation by name."""

from typing import Literal

import jax

Implementation = Literal["reference", "xla", "triton", "mosaic_tpu"]

_AVAILABLE = ("reference", "xla")
_PLANNED = ("triton", "mosaic_tpu")


def resolve(implementation: Implementation | None) -> Implementation:
    """The implementation that will run; None picks the best one for the platform.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the name is known but has no kernel.
    """
    if implementation is None:
        return "xla"
    if implementation in _AVAILABLE:
        return implementation
    if implementation in _PLANNED:
        raise NotImplementedError(
            f"{implementation=} has no kernel yet; use one of {_AVAILABLE} or None"
        )
    raise ValueError(f"{implementation=} is unknown; use one of {_AVAILABLE + _PLANNED} or None")


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
      ValueError: as `bind_dims`, or a dimension is 0, or the query heads are not a multiple of the
        KV heads.
    """
    sizes = bind_dims(**arrays)
    if empty := [letter for letter, size in sizes.items() if not size]:
        raise ValueError(f"attention needs every dimension to be at least 1; {empty} are 0")
    if sizes["n"] % sizes["k"]:
        raise ValueError(f"{sizes['n']} query heads are not a multiple of {sizes['k']} KV heads")
    return sizes | {"g": sizes["n"] // sizes["k"]}
