"""One spelling for tensor names that checkpoints spell in two ways.

Checkpoints on the hub say `model.layers.0...` and `visual.blocks.0...`; state dicts of recent
`transformers` say `model.language_model.layers.0...` and `model.visual.blocks.0...`. The hub's
spelling is canonical here.
"""

from collections.abc import Iterable

_MODULE_PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))


def canonical(name: str) -> str:
    """Either spelling -> the hub's."""
    for module, hub in _MODULE_PREFIXES:
        if name.startswith(module):
            return hub + name.removeprefix(module)
    return name


def module_path(name: str) -> str:
    """The hub's spelling -> the one of `transformers` state dicts."""
    for module, hub in reversed(_MODULE_PREFIXES):
        if name.startswith(hub):
            return module + name.removeprefix(hub)
    return name


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """{canonical name: name as given}.

    Raises:
      ValueError: two names mean the same tensor.
    """
    found: dict[str, str] = {}
    for name in names:
        key = canonical(name)
        if key in found:
            raise ValueError(f"{found[key]} and {name} are two spellings of one tensor")
        found[key] = name
    return found
