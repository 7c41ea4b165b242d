"""Who may import whom: programs -> videonsa_jax -> pallas_kernels -> jax."""

import ast
import pathlib

import pytest

import pallas_kernels

ROOT = pathlib.Path(__file__).resolve().parents[1]
FORBIDDEN = {  # folder -> top-level packages that its files must not import
    "pallas_kernels": {"videonsa_jax", "convert", "flax", "optax", "configs"},
    "videonsa_jax": {"convert", "configs", "torch", "transformers"},
    "videonsa_jax/data": {"jax", "flax", "optax", "orbax", "pallas_kernels"},
    "videonsa_jax/evaluation/benchmarks": {"jax", "flax", "optax", "orbax", "pallas_kernels"},
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


# May reach inside of pallas_kernels: its own tests, and one that pretends to be on a GPU.
INSIDE = {"tests/pallas_kernels", "tests/videonsa_jax/training/test_triton_training.py"}


def _names_inside(path: pathlib.Path) -> set[str]:
    """What a file imports of pallas_kernels that is not one of its public names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            found |= {name for name in names if name.startswith("pallas_kernels.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "pallas_kernels":
            found |= {alias.name for alias in node.names} - set(pallas_kernels.__all__)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("pallas_kernels."):
            found.add(node.module)
    return found


def test_others_use_only_the_public_names_of_pallas_kernels():
    wrong = {}
    for folder in ("videonsa_jax", "convert", "benchmarks", "examples", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if not any(name == x or name.startswith(x + "/") for x in INSIDE):
                wrong |= {name: sorted(found)} if (found := _names_inside(path)) else {}
    assert not wrong
