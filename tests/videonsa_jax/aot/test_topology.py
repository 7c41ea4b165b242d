"""Names of devices that are not there."""

import pytest

from videonsa_jax.aot.topology import ToolchainMissing, parse_topology
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh_config import MeshConfig


@pytest.mark.parametrize(
    ("name", "size", "platform"),
    [
        ("h100:8", 8, "gpu"),
        ("v5e:16x16", 256, "tpu"),
        ("v5p:4x4x4", 64, "tpu"),
        ("v6e:16x16", 256, "tpu"),
    ],
)
def test_a_name_says_which_devices_and_how_many(name, size, platform):
    topology = parse_topology(name)
    assert (topology.size, topology.chip.platform) == (size, platform)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100:8", "'a100' must be one of"),
        ("v5p:4x4", "'4x4' must be 3 size"),
        ("v5e:0x4", "'0x4' must be 2 size"),
        ("h100", "'' must be 1 size"),
        ("h100:16", "a node has 8 GPUs at most"),
    ],
)
def test_a_wrong_name_is_explained(name, message):
    with pytest.raises(UserError, match=message):
        parse_topology(name)


@pytest.mark.parametrize("name", ["h100:8", "v5e:16x16"])
def test_a_python_that_cannot_compile_for_the_devices_says_what_it_lacks(name, monkeypatch):
    topology = parse_topology(name)
    monkeypatch.setattr("videonsa_jax.aot.topology._installed", lambda name: False)
    with pytest.raises(ToolchainMissing, match=f"{topology.chip.packages[0]}.* not installed"):
        topology.mesh(MeshConfig(fsdp=topology.size))
