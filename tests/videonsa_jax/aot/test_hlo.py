"""What compiled programs exchange and write, counted from their text."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from videonsa_jax.aot.hlo import Collective, Program
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig

STEPS, ROWS = 3, 64  # of a loop; of f32[rows, 4] on each device
BYTES = ROWS * 4 * 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=2, context=4))


def collectives(mesh, exchange):
    """Of a program that exchanges f32[rows, 4] in each of `STEPS` steps."""

    def body(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(exchange(x)), None), x, length=STEPS)[0]

    specs = P("fsdp", "context")
    split = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    x = jax.ShapeDtypeStruct((2 * ROWS, 16), jnp.float32)
    return Program(jax.jit(split).lower(x).compile().as_text()).collectives(dict(mesh.shape))


def gathered(x):
    whole = jax.lax.all_gather(x, "context", axis=1, tiled=True)
    return x + jnp.sin(whole).reshape(*x.shape, 4).sum(-1)


def scattered(x):
    return jax.lax.psum_scatter(jnp.tile(x, (1, 4)), "context", scatter_dimension=1, tiled=True)


def turned(x, size):
    return jax.lax.ppermute(x, "context", [(i, (i + 1) % size) for i in range(size)])


@pytest.mark.parametrize(
    ("exchange", "kind", "axis", "received"),
    [
        (lambda x: jax.lax.psum(x, "fsdp"), "all-reduce", "fsdp", 2 * BYTES // 2),
        (lambda x: jax.lax.psum(x, "context"), "all-reduce", "context", 2 * BYTES * 3 // 4),
        (gathered, "all-gather", "context", 3 * BYTES),
        (scattered, "reduce-scatter", "context", 3 * BYTES),
        (functools.partial(turned, size=4), "collective-permute", "context", BYTES),
    ],
    ids=["sum_fsdp", "sum_context", "gather", "scatter", "turn"],
)
def test_an_exchange_in_a_loop_counts_every_time(mesh, exchange, kind, axis, received):
    assert collectives(mesh, exchange) == [Collective(kind, axis, STEPS, STEPS * received)]


def test_what_a_device_hands_to_itself_is_no_exchange():
    mesh = make_mesh(MeshConfig(fsdp=8))
    assert collectives(mesh, functools.partial(turned, size=1)) == []


GROUPS = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": "context",
    "replica_groups=[2,4]<=[8]": "tensor+context",
    "replica_groups=[4,2]<=[2,4]T(1,0)": "fsdp",
    "replica_groups={}": "fsdp+tensor+context",
    "replica_groups=mesh['a'=2,'b'=4] {'b'}": "tensor+context",
    "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}": "tensor",
    "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}": "context",
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": "fsdp+tensor",
    "source_target_pairs={{0,4},{4,0}}": "fsdp",
    "source_target_pairs={{0,0},{1,3},{3,1}}": "tensor",
}


@pytest.mark.parametrize(("groups", "axis"), GROUPS.items(), ids=GROUPS.values())
def test_groups_of_devices_are_mesh_axes(groups, axis):
    hlo = f"""HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %s = f32[] add(%a, %b)
}}
"""
    (found,) = Program(hlo).collectives({"fsdp": 2, "tensor": 2, "context": 2})
    assert found.axis == axis
    with pytest.raises(ValueError, match="unknown form"):
        Program(hlo.replace(groups, "replica_groups=?")).collectives({"fsdp": 8})


def test_an_exchange_that_is_only_started_counts_its_result():
    hlo = """HloModule m

ENTRY %main (x: f32[8], y: f32[16]) -> f32[64] {
  %x = f32[8]{0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %s = ((f32[8]{0}, f32[16]{0}), (f32[32]{0}, f32[64]{0})) all-gather-start(%x, %y), \
replica_groups=[1,4]<=[4], dimensions={0}
  %d = (f32[32]{0}, f32[64]{0}) all-gather-done(%s)
  %r = ((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%y), replica_groups=[1,4]<=[4]
}
"""
    found = Program(hlo).collectives({"fsdp": 4})
    assert found == [
        Collective("all-gather", "fsdp", 1, (32 + 64) * 4 * 3 // 4),
        Collective("reduce-scatter", "fsdp", 1, 16 * 4 * 3 // 4),
    ]


def test_only_the_change_of_an_array_that_is_updated_in_place_is_written():
    def fill(x):
        return jax.lax.scan(lambda i, x: (i + 1, jnp.sin(x)), 0, x)[1]

    x = jax.ShapeDtypeStruct((STEPS, ROWS, 4), jnp.float32)
    written = Program(jax.jit(fill).lower(x).compile().as_text()).written_bytes()
    assert STEPS * BYTES <= written < 4 * STEPS * BYTES
