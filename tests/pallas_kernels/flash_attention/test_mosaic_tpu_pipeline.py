"""How much the TPU kernels of attention over ranges compute, by the tiles that they visit."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.flash_attention.mask import KeyRangeMask
from pallas_kernels.flash_attention.mosaic_tpu_pipeline import PipelineDims
from pallas_kernels.flash_attention.tile_schedule import TileSchedule

WINDOW, BLOCK = 256, 64


def _computed(mask, keys, kind):
    """Pairs of a query and a key: of the forward kernel and of that of the key gradients; the dims.

    As at the released sizes: 28 query heads and 4 KV heads of 128.
    """
    shapes = ((1, x, heads, 128) for x, heads in ((mask.lo.shape[1], 28), (keys, 4)))
    arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        dims = PipelineDims.of(*arrays)
    tiles = {"block_q": dims.block_q, "block_kv": dims.block_kv}
    ranges = [
        plan(mask, keys, **tiles).ranges for plan in (TileSchedule.by_query, TileSchedule.by_key)
    ]
    visits = (int((x[..., 3] - x[..., 0]).sum()) for x in ranges)
    return [count * dims.block_q * dims.block_kv for count in visits], dims


@pytest.mark.parametrize("kind", ["TPU v5p", "TPU v6 lite"])
@pytest.mark.parametrize("tokens", [8192, 131072])
def test_a_window_is_linear_in_the_length(tokens, kind):
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    computed, dims = _computed(KeyRangeMask.of_window(0 * pos, pos, WINDOW), tokens, kind)
    assert max(computed) <= tokens * (WINDOW + dims.block_q + dims.block_kv)


@pytest.mark.parametrize("kind", ["TPU v5p", "TPU v6 lite"])
@pytest.mark.parametrize("tokens", [8192, 131072])
def test_block_means_are_half_of_all_pairs_of_queries_and_blocks(tokens, kind):
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    visible = jnp.stack([0 * pos, (pos + 1) // BLOCK], -1)
    computed, dims = _computed(KeyRangeMask.of_ranges(visible), tokens // BLOCK, kind)
    assert max(computed) <= tokens * (tokens // BLOCK + dims.block_kv + dims.block_q // BLOCK) / 2


def test_packed_sequences_do_not_see_each_other():
    tokens, sequence = 32768, 4096
    pos = jnp.arange(tokens, dtype=jnp.int32)[None]
    start = pos // sequence * sequence
    visible = jnp.stack([start, pos + 1], -1) // BLOCK
    computed, dims = _computed(KeyRangeMask.of_ranges(visible), tokens // BLOCK, "TPU v5p")
    assert max(computed) <= tokens * (sequence // BLOCK + 2 * dims.block_kv)
