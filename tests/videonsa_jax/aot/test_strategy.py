"""Strategies by name become rules and a mesh of all devices."""

import math

import pytest

from videonsa_jax.aot.strategy import factorisations, parse_strategy
from videonsa_jax.config.schema import PRESETS
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh_config import MeshConfig

TEXT = PRESETS["qwen2_5_vl_7b"].text  # 4 KV heads


@pytest.mark.parametrize(
    ("text", "devices", "mesh"),
    [
        ("dp", 8, MeshConfig(data=8, fsdp=1)),
        ("fsdp", 8, MeshConfig(fsdp=8)),
        ("hsdp", 8, MeshConfig(dcn=2, fsdp=4)),
        ("tp", 8, MeshConfig(tensor=4, data=2, fsdp=1)),
        ("fsdp_tp", 2, MeshConfig(tensor=2, fsdp=1)),
        ("fsdp_tp:tensor=2", 8, MeshConfig(tensor=2, fsdp=4)),
        ("fsdp_cp:context=8", 256, MeshConfig(context=8, fsdp=32)),
        ("fsdp_tp_cp:context=2", 64, MeshConfig(context=2, tensor=4, fsdp=8)),
    ],
)
def test_a_name_and_sizes_give_a_mesh(text, devices, mesh):
    assert parse_strategy(text, devices, TEXT).mesh == mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp_xp", "'fsdp_xp' must be one of"),
        ("fsdp:context=2", r"'context=2' must be one of \[\]"),
        ("fsdp_cp:context=0", "'context=0' must be one of"),
        ("fsdp_cp:context=3", "does not divide 8 devices"),
    ],
)
def test_a_wrong_name_is_explained(text, message):
    with pytest.raises(UserError, match=message):
        parse_strategy(text, 8, TEXT)


def test_a_sweep_takes_every_mesh_that_splits_the_heads():
    found = [strategy.mesh for strategy in factorisations("fsdp_tp_cp", 16, TEXT)]
    assert all(math.prod((x.fsdp, x.tensor, x.context)) == 16 for x in found)
    assert {x.tensor for x in found} == {1, 2, 4}
    assert {x.context for x in found} == {1, 2, 4, 8, 16}
    assert len(found) == len(set(found)) == 5 + 4 + 3
