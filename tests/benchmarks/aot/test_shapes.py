"""Arrays with a number for every token and block are seen in a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot.shapes import scores

TOKENS, BLOCK, HEADS, WIDTH = 2304, 64, 4, 16  # 36 blocks, 64 filled up


def compiled(fn, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn).lower(*arguments).compile().as_text()


def logits(q, k):
    return jnp.einsum("snh,cnh->nsc", q, k)


@pytest.mark.parametrize("blocks", [36, 64])
def test_scores_of_all_queries_are_seen(blocks):
    hlo = compiled(
        lambda q, k: jax.nn.softmax(logits(q, k)), (TOKENS, HEADS, WIDTH), (blocks, HEADS, WIDTH)
    )
    assert any(str(TOKENS) in found for found in scores(hlo, TOKENS, BLOCK, [HEADS]))


def test_scores_of_one_chunk_at_a_time_are_not():
    def chunked(q, k):
        chunks = q.reshape(-1, 32, HEADS, WIDTH)
        return jax.lax.map(lambda q: jax.nn.softmax(logits(q, k)).max(-1), chunks)

    hlo = compiled(chunked, (TOKENS, HEADS, WIDTH), (36, HEADS, WIDTH))
    assert not scores(hlo, TOKENS, BLOCK, [HEADS])


def test_values_inside_of_a_fusion_are_not_in_memory():
    hlo = """HloModule m

%fused (p: f32[36]) -> f32[36] {
  %p = f32[36]{0} parameter(0)
  %b = f32[2304,36]{1,0} broadcast(%p), dimensions={1}
  ROOT %r = f32[36]{0} reduce(%b, %zero), dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[36]) -> f32[36] {
  %x = f32[36]{0} parameter(0)
  ROOT %f = f32[36]{0} fusion(%x), kind=kLoop, calls=%fused
}
"""
    assert not scores(hlo, TOKENS, BLOCK, [HEADS])
    assert scores(hlo.replace("calls=%fused", "calls=%other"), TOKENS, BLOCK, [HEADS])
