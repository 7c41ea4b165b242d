"""Native sparse attention: both implementations against float64 loops, and what must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BLOCKS, NSASpec, dense_attention, nsa_attention
from tests import testing
from tests.pallas_kernels.nsa_loops import nsa_loops

SPEC = NSASpec(block_size=16, block_count=3, window_size=20)
NAMES = ("dq", "dk", "dv", "dgates")
LENGTHS = {  # tokens: (query heads, KV heads), group sizes 1, 4, 7, 16
    1: (7, 1),
    2: (4, 1),
    15: (2, 2),
    16: (16, 1),
    17: (7, 1),
    63: (4, 1),
    64: (1, 1),
    65: (14, 2),
    127: (16, 1),
    130: (4, 4),
    257: (7, 1),
    1000: (4, 1),
}


def _inputs(tokens, heads, kv_heads, *, keys=None, rows=1, width=16, seed=0):
    rng = np.random.default_rng(seed)
    keys = tokens if keys is None else keys

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return (
        2 * normal(rows, tokens, heads, width),
        normal(rows, keys, kv_heads, width),
        normal(rows, keys, kv_heads, width),
        jax.nn.sigmoid(normal(rows, tokens, heads, 3)),
        normal(rows, tokens, heads, width),
    )


def _value_and_grads(arrays, dout, *, spec=SPEC, **kwargs):
    @jax.jit
    def run(arrays, dout):
        out, vjp = jax.vjp(functools.partial(nsa_attention, spec=spec, **kwargs), *arrays)
        return out, vjp(dout)

    return run(arrays, dout)


def _assert_equal_to_loops(got, loops, dtype="float32"):
    testing.assert_close("out", got[0], loops[0], dtype=dtype)
    for name, ours, theirs in zip(NAMES, got[1], loops[1], strict=True):
        testing.assert_close(name, ours, theirs, dtype=dtype)


@pytest.fixture(params=["reference", "xla"])
def implementation(request):
    return request.param


@pytest.mark.parametrize("tokens", LENGTHS)
def test_xla_equals_float64_loops(tokens):
    *arrays, dout = _inputs(tokens, *LENGTHS[tokens], seed=tokens)
    _assert_equal_to_loops(
        _value_and_grads(arrays, dout, implementation="xla"),
        nsa_loops(*arrays, dout, spec=SPEC),
    )


@pytest.mark.parametrize("tokens", [1, 65, 130])
def test_reference_equals_float64_loops(tokens):
    *arrays, dout = _inputs(tokens, *LENGTHS[tokens], seed=tokens)
    _assert_equal_to_loops(
        _value_and_grads(arrays, dout, implementation="reference"),
        nsa_loops(*arrays, dout, spec=SPEC),
    )


def test_forced_blocks(implementation):
    spec = NSASpec(block_size=16, block_count=4, window_size=5, forced_first=1, forced_local=2)
    *arrays, dout = _inputs(130, 4, 2)
    _assert_equal_to_loops(
        _value_and_grads(arrays, dout, spec=spec, implementation=implementation),
        nsa_loops(*arrays, dout, spec=spec),
    )


@pytest.mark.parametrize("tokens", [130, 600])
def test_xla_equals_reference(tokens):
    *arrays, dout = _inputs(tokens, 14, 2, rows=2)
    want = _value_and_grads(arrays, dout, implementation="reference")
    _assert_equal_to_loops(_value_and_grads(arrays, dout, implementation="xla"), want)


def test_bfloat16_is_near_float64_on_the_same_rounded_inputs():
    arrays = [x.astype(jnp.bfloat16) for x in _inputs(130, 7, 1)]
    spec = NSASpec(block_size=16, block_count=9, window_size=20)  # all blocks: no choice to differ
    got = _value_and_grads(arrays[:4], arrays[4], spec=spec, implementation="xla")
    assert got[0].dtype == jnp.bfloat16
    rounded = (x.astype(jnp.float32) for x in arrays)
    _assert_equal_to_loops(got, nsa_loops(*rounded, spec=spec), "bfloat16")


@pytest.mark.parametrize("token", [0, 15, 64])
def test_a_later_token_never_changes_an_earlier_output(implementation, token):
    q, k, v, gates, _ = _inputs(130, 4, 2)
    run = jax.jit(functools.partial(nsa_attention, spec=SPEC, implementation=implementation))
    before = run(q, k, v, gates)
    after = run(q.at[:, token].add(3), k.at[:, token].add(3), v.at[:, token].add(3), gates)
    np.testing.assert_array_equal(before[:, :token], after[:, :token])
    assert (before[:, token] != after[:, token]).all()


def test_enough_blocks_make_the_selected_branch_dense():
    q, k, v, gates, dout = _inputs(130, 4, 2)
    only_selected = jnp.zeros_like(gates).at[..., 1].set(1)
    spec = NSASpec(block_size=16, block_count=9, window_size=1)
    pos = jnp.arange(130)[None]
    got, grads = _value_and_grads((q, k, v, only_selected), dout, spec=spec, implementation="xla")
    want, vjp = jax.vjp(
        lambda *x: dense_attention(
            *x, start=0 * pos, query_pos=pos, key_pos=pos, implementation="reference"
        ),
        q,
        k,
        v,
    )
    for name, ours, theirs in zip(NAMES, (got, *grads[:3]), (want, *vjp(dout)), strict=True):
        testing.assert_close(name, ours, theirs)


def test_packed_segments_equal_separate_runs(implementation):
    lengths, begins, total = (40, 17, 48), (0, 48, 80), 140
    *arrays, dout = _inputs(total, 4, 2, seed=1)
    ids = np.full((1, total), -1, np.int32)
    for i, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        ids[:, begin : begin + length] = i
    padding = jnp.asarray(ids < 0)[..., None, None]
    poisoned = [jnp.where(padding, jnp.nan, x) for x in arrays]
    out, grads = _value_and_grads(poisoned, dout, segment_ids=ids, implementation=implementation)
    assert not np.asarray(out)[ids < 0].any()
    for begin, length in zip(begins, lengths, strict=True):
        part = slice(begin, begin + length)
        alone = nsa_loops(*(x[:, part] for x in arrays), dout[:, part], spec=SPEC)
        _assert_equal_to_loops((out[:, part], [x[:, part] for x in grads]), alone)


def test_offset_queries_equal_the_tail_of_all_queries(implementation):
    q, k, v, gates, _ = _inputs(130, 4, 2)
    run = functools.partial(nsa_attention, spec=SPEC, implementation=implementation)
    whole = jax.jit(run)(q, k, v, gates)
    tail = jax.jit(lambda offset: run(q[:, 101:], k, v, gates[:, 101:], q_offset=offset))
    testing.assert_close("traced offset", tail(jnp.int32(101)), whole[:, 101:])
    middle = jax.jit(lambda: run(q[:, 50:60], k, v, gates[:, 50:60], q_offset=50))
    testing.assert_close("static offset", middle(), whole[:, 50:60])


def test_zero_queries_choose_the_lowest_blocks(implementation):
    q, k, v, gates, dout = _inputs(130, 4, 2)
    q = jnp.zeros_like(q)
    got = _value_and_grads((q, k, v, gates), dout, implementation=implementation)
    loops = nsa_loops(q, k, v, gates, dout, spec=SPEC)
    assert loops[2][0, 129, 0] == {0, 1, 8}
    _assert_equal_to_loops(got, loops)


def test_large_logits_stay_finite(implementation):
    q, k, v, gates, dout = _inputs(65, 4, 2)
    got = _value_and_grads((40 * q, k, v, gates), dout, implementation=implementation)
    want = nsa_loops(40 * q, k, v, gates, dout, spec=SPEC)
    testing.assert_close("out", got[0], want[0])


def test_no_array_grows_with_the_square_of_the_length():
    tokens = 4096
    limit = tokens * tokens // 64
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in (*[(1, tokens, 1, 16)] * 3, (1, tokens, 1, 3))
    ]
    assert max(x.size for x in arrays) < limit, "the inputs would hide a square"
    spec = NSASpec(block_size=64, block_count=8, window_size=256)

    def loss(*arrays):
        return nsa_attention(*arrays, spec=spec, implementation="xla").sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(*arrays)
    assert testing.largest_array(jaxpr) < limit


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "kv_heads": (lambda a: {"k": a["k"][:, :, :1]}, "v must be .* with k=1 of k"),
        "width": (lambda a: {"k": a["k"][..., :8]}, "k must be .* with h=16 of q"),
        "gates": (lambda a: {"gates": a["gates"][..., :2]}, r"gates must be \[b s n 3\] with 3=3"),
        "rank": (lambda a: {"q": a["q"][0]}, r"q must be \[b s n h\], got shape \(32, 4, 16\)"),
        "empty": (
            lambda a: {"q": a["q"][:, :0], "gates": a["gates"][:, :0]},
            r"every dimension to be at least 1; \['s'\] are 0",
        ),
        "heads": (
            lambda a: {"q": a["q"][:, :, :3], "gates": a["gates"][:, :, :3]},
            "3 query heads are not a multiple of 2 KV heads",
        ),
        "offset": (lambda a: {"q_offset": 1}, "q_offset=1 puts 32 queries outside of 32 keys"),
        "segment": (
            lambda a: {"segment_ids": jnp.zeros((1, 32), jnp.int32).at[:, 20:].set(1)},
            r"segment_ids\[0\] starts a segment at 20, not a multiple of the block size 16",
        ),
        "name": (lambda a: {"implementation": "cuda"}, "implementation='cuda' is unknown"),
    }.values(),
)
def test_bad_arguments_are_named(change, message):
    q, k, v, gates, _ = _inputs(32, 4, 2)
    arguments = {"q": q, "k": k, "v": v, "gates": gates}
    with pytest.raises(ValueError, match=message):
        nsa_attention(**(arguments | change(arguments)), spec=SPEC)


def test_a_jitted_program_names_misplaced_segments_when_jit_is_off():
    q, k, v, gates, _ = _inputs(32, 4, 2)
    jitted = jax.jit(lambda ids: nsa_attention(q, k, v, gates, spec=SPEC, segment_ids=ids))
    ids = jnp.zeros((1, 32), jnp.int32).at[:, 20:].set(1)
    with jax.disable_jit(), pytest.raises(ValueError, match="starts a segment at 20"):
        jitted(ids)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"window_size": 2.5}, "window_size must be an integer >= 1, got 2.5"),
        ({"forced_local": 0}, "forced_local must be an integer >= 1"),
        ({"block_count": 2, "forced_first": 2}, "forces 2 first [+] 1 local blocks"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        NSASpec(**sizes)


def test_saved_blocks_are_not_chosen_again_in_the_backward_pass():
    q, k, v, gates = (jnp.ones((1, 130, *shape)) for shape in ((4, 64), (2, 64), (2, 64), (4, 3)))
    op = functools.partial(nsa_attention, spec=NSASpec(32, 3, 40), implementation="xla")

    def choices(policy):
        layer = jax.checkpoint(lambda q: op(q, k, v, gates).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(layer))(q)).count("top_k")

    assert choices(None) == 2
    assert choices(jax.checkpoint_policies.save_only_these_names(BLOCKS)) == 1
