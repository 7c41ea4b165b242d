"""How much the TPU kernels of attention over ranges compute, by the lists that they walk."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.flash_attention.mosaic_tpu_pipeline import Cut
from pallas_kernels.flash_attention.tile_schedule import Visits
from pallas_kernels.flash_attention.xla_tiles import Sight

WINDOW, BLOCK = 256, 64


def _computed(sight, keys, kind):
    """Pairs of a query and a key: of the forward kernel and of that of the key gradients; the cut.

    As at the released sizes: 28 query heads and 4 KV heads of 128.
    """
    shapes = ((1, x, heads, 128) for x, heads in ((sight.lo.shape[1], 28), (keys, 4)))
    arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        cut = Cut.of(*arrays)
    tiles = {"queries": cut.rows, "keys": cut.keys}
    spans = [plan(sight, keys, **tiles).spans for plan in (Visits.plan, Visits.plan_by_key)]
    visits = (int((x[..., 3] - x[..., 0]).sum()) for x in spans)
    return [count * cut.rows * cut.keys for count in visits], cut


@pytest.mark.parametrize("kind", ["TPU v5p", "TPU v6 lite"])
@pytest.mark.parametrize("tokens", [8192, 131072])
def test_a_window_is_linear_in_the_length(tokens, kind):
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    computed, cut = _computed(Sight.of_window(0 * pos, pos, WINDOW), tokens, kind)
    assert max(computed) <= tokens * (WINDOW + cut.rows + cut.keys)


@pytest.mark.parametrize("kind", ["TPU v5p", "TPU v6 lite"])
@pytest.mark.parametrize("tokens", [8192, 131072])
def test_block_means_are_half_of_all_pairs_of_queries_and_blocks(tokens, kind):
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    visible = jnp.stack([0 * pos, (pos + 1) // BLOCK], -1)
    computed, cut = _computed(Sight.of_blocks(visible), tokens // BLOCK, kind)
    assert max(computed) <= tokens * (tokens // BLOCK + cut.keys + cut.rows // BLOCK) / 2


def test_packed_sequences_do_not_see_each_other():
    tokens, sequence = 32768, 4096
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    start = pos // sequence * sequence
    visible = jnp.stack([start, pos + 1], -1) // BLOCK
    computed, cut = _computed(Sight.of_blocks(visible), tokens // BLOCK, "TPU v5p")
    assert max(computed) <= tokens * (sequence // BLOCK + 2 * cut.keys)
