"""Who may import whom: programs -> videonsa_jax -> pallas_kernels -> jax."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FORBIDDEN = {  # folder -> top-level packages that its files must not import
    "pallas_kernels": {"videonsa_jax", "convert", "flax", "optax", "configs"},
    "videonsa_jax": {"convert", "configs", "torch", "transformers"},
    "videonsa_jax/data": {"jax", "flax", "optax", "orbax", "pallas_kernels"},
    "configs": {"jax", "flax", "videonsa_jax", "pallas_kernels"},
    "convert": {"torch", "transformers"},
}
LAZY = {"convert/parity.py"}  # may import PyTorch inside functions: `verify` works without it


def _imports(path: pathlib.Path) -> set[str]:
    names, tree = set(), ast.parse(path.read_text())
    lazy = str(path.relative_to(ROOT)) in LAZY
    for node in tree.body if lazy else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folder_imports_only_downwards(folder):
    wrong = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in (ROOT / folder).rglob("*.py")
        if (found := _imports(path) & FORBIDDEN[folder])
    }
    assert not wrong
