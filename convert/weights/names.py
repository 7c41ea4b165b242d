"""One spelling for tensor names that checkpoints spell in several ways."""

from collections.abc import Iterable, Sequence

Prefixes = Sequence[tuple[str, str]]  # (another spelling, the canonical one); the first that fits


def canonical(name: str, prefixes: Prefixes) -> str:
    """Any spelling -> the canonical one."""
    for other, own in prefixes:
        if name.startswith(other):
            return own + name.removeprefix(other)
    return name


def canonical_names(names: Iterable[str], prefixes: Prefixes) -> dict[str, str]:
    """{canonical name: name as given}.

    Raises:
      ValueError: two names mean the same tensor.
    """
    found: dict[str, str] = {}
    for name in names:
        key = canonical(name, prefixes)
        if key in found:
            raise ValueError(f"{found[key]} and {name} are two spellings of one tensor")
        found[key] = name
    return found
