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
LAYERS = (  # rooms of videonsa_jax: a file imports from its own room and from the layers before it
    {"errors", "progress", "batch"},
    {"sharding"},
    {"config"},
    {"data", "model"},
    {"training"},
    {"evaluation", "aot"},
    {"analysis"},
)
# May import PyTorch inside functions: `verify` works without it.
LAZY = {"convert/compare_logits.py"}


def _modules(path: pathlib.Path) -> set[str]:
    """Dotted names that a file imports, of names in a module `module.name`."""
    names, tree = set(), ast.parse(path.read_text())
    lazy = str(path.relative_to(ROOT)) in LAZY
    for node in tree.body if lazy else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _imports(path: pathlib.Path) -> set[str]:
    return {name.split(".")[0] for name in _modules(path)}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folder_imports_only_downwards(folder):
    wrong = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in (ROOT / folder).rglob("*.py")
        if (found := _imports(path) & FORBIDDEN[folder])
    }
    assert not wrong


def test_every_room_of_the_model_has_a_layer():
    found = {path.stem for path in (ROOT / "videonsa_jax").iterdir()} - {"__init__", "__pycache__"}
    assert found == set().union(*LAYERS)


def test_inside_the_model_imports_go_down():
    package, wrong = ROOT / "videonsa_jax", []
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__":  # names the homes of the public names, and imports none of them
            continue
        (layer,) = (number for number, rooms in enumerate(LAYERS) if room in rooms)
        allowed = {room}.union(*LAYERS[:layer])
        used = {name.split(".")[1] for name in _modules(path) if name.startswith("videonsa_jax.")}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(used - allowed)]
    assert not wrong
