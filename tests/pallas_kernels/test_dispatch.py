"""Who runs where: implementations by platform, what kernels take, and lowering without a GPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import (
    BlockSet,
    NSASpec,
    SelectRule,
    block_mean,
    compressed_attention,
    dense_attention,
    dispatch,
    interval_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from pallas_kernels.block_sizes.supported import Call

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
ROCM = AbstractDevice(device_kind="AMD Instinct MI300X", num_cores=None, platform="rocm")
V5P = AbstractDevice(device_kind="TPU v5p", num_cores=2, platform="tpu")
DENSE = Call("dense_attention", width=128, group=7, dtypes=("bfloat16",))


def _on(device):
    """As if code that is traced here ran on `device`."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _calls(*, tokens=64, heads=4, kv_heads=2, width=64, block=32, dtype=jnp.float32):
    """{operation: (function of implementation and interpret, its arrays)}."""

    def floats(*shape):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    def ints(*shape):
        return jax.ShapeDtypeStruct((1, *shape), jnp.int32)

    def dense(q, k, v, start, query_pos, key_pos, **how):
        places = {"start": start, "query_pos": query_pos, "key_pos": key_pos}
        return dense_attention(q, k, v, **places, **how)

    def selected(q, k, v, bits, pos, **how):
        return selected_attention(q, k, v, BlockSet(bits, block), pos, scale=1.0, **how)

    def interval(q, k, v, interval, **how):
        return interval_attention(q, k, v, interval=interval, max_length=16, **how)

    spec = NSASpec(block_size=block, block_count=2, window_size=16)
    rule = SelectRule(top_k=2, num_init_blocks=0, num_local_blocks=1, block=block)
    q, kv, pos = floats(tokens, heads, width), floats(tokens, kv_heads, width), ints(tokens)
    lse = jax.ShapeDtypeStruct((1, tokens, heads), jnp.float32)
    bits = jax.ShapeDtypeStruct((1, tokens, kv_heads, -(-tokens // (32 * block))), jnp.uint32)
    gates, visible = floats(tokens, heads, 3), ints(tokens, 2)
    window = functools.partial(window_attention, window=16, scale=1.0)
    return {
        "block_mean": (functools.partial(block_mean, block=block), (kv,)),
        "compressed": (
            functools.partial(compressed_attention, scale=1.0),
            (q, kv, kv, visible),
        ),
        "select": (
            functools.partial(select_blocks, rule=rule, scale=1.0),
            (q, kv, lse, visible, pos),
        ),
        "selected": (selected, (q, kv, kv, bits, pos)),
        "window": (window, (q, kv, kv, pos, pos)),
        "interval": (interval, (q, kv, kv, visible)),
        "dense": (dense, (q, kv, kv, pos, pos, pos)),
        "nsa": (functools.partial(nsa_attention, spec=spec), (q, kv, kv, gates)),
    }


def _trace(call, **how):
    run, arrays = call
    return jax.make_jaxpr(functools.partial(run, **how))(*arrays)


def _is_kernel(jaxpr):
    return "pallas_call" in str(jaxpr)


KERNELS = tuple(name for name in _calls() if name != "block_mean")  # a mean needs no kernel


@pytest.mark.parametrize("op", KERNELS)
def test_a_kernel_needs_a_gpu_or_the_interpreter(op):
    message = "implementation='triton' runs on a GPU and the platform is 'cpu'; use .*'xla', or int"
    with pytest.raises(ValueError, match=message):
        _trace(_calls()[op], implementation="triton")
    _trace(_calls()[op], implementation="triton", interpret=True)


@pytest.mark.parametrize("op", KERNELS)
def test_none_is_a_kernel_on_a_gpu_only(op):
    assert not _is_kernel(_trace(_calls()[op]))
    with _on(H100):
        assert _is_kernel(_trace(_calls()[op]))
        assert not _is_kernel(_trace(_calls()[op], implementation="xla"))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize(
    ("sizes", "message"),
    {
        "width": ({"width": 96}, r"head width 96 has no .* of \(64, (80, )?128\) or impl.*'xla'"),
        "group": ({"heads": 34}, "17 query heads per KV head have no .*; use at most 16 or impl"),
        "dtype": (
            {"dtype": jnp.int8},
            r"dtypes \['int8'\] of q, k, v have no .*; use one of \('bf",
        ),
    }.values(),
    ids=["width", "group", "dtype"],
)
def test_sizes_without_a_kernel_are_named(op, sizes, message):
    with pytest.raises(ValueError, match=message):
        _trace(_calls(**sizes)[op], implementation="triton", interpret=True)


def test_a_block_size_without_a_kernel_is_named():
    message = r"block size 16 has no Triton kernel; use one of \(32, 64\) or implementation='xla'"
    with pytest.raises(ValueError, match=message):
        _trace(_calls(block=16)["nsa"], implementation="triton", interpret=True)


@pytest.mark.parametrize("sizes", [{"width": 32}, {"block": 16}, {"heads": 34}])
def test_none_on_a_gpu_takes_sizes_without_a_kernel(sizes):
    with _on(H100):
        assert not _is_kernel(_trace(_calls(**sizes)["nsa"]))


@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
def test_an_operation_without_kernels_takes_no_name_of_kernels(name):
    message = rf"implementation='{name}' has no kernel here; use one of \('reference', 'xla'\) or"
    with _on(H100), pytest.raises(NotImplementedError, match=message):
        _trace(_calls()["block_mean"], implementation=name)
    for name in ("reference", "xla", None):
        assert not _is_kernel(_trace(_calls()["block_mean"], implementation=name))


def test_an_unknown_name_is_an_error_that_names_the_known_ones():
    message = (
        r"'cuda' is unknown; use one of \('reference', 'triton', 'mosaic_tpu', 'xla'\) or None"
    )
    for call in _calls().values():
        with pytest.raises(ValueError, match=message):
            _trace(call, implementation="cuda")


@pytest.mark.parametrize(
    ("device", "name"), [(H100, "triton"), (V5P, "mosaic_tpu"), (ROCM, "triton"), (None, "xla")]
)
def test_none_is_the_first_that_runs_here(device, name):
    with _on(device):
        assert dispatch.resolve(None, DENSE).name == name
        assert dispatch.resolve(name, DENSE).name == name
        assert dispatch.resolve(None, dataclasses.replace(DENSE, width=96)).name == "xla"


@pytest.mark.parametrize("device", [H100, None])
def test_a_tpu_kernel_needs_a_tpu_or_the_interpreter(device):
    platform = "gpu" if device else "cpu"
    message = f"implementation='mosaic_tpu' runs on a TPU and the platform is '{platform}'; use"
    with _on(device), pytest.raises(ValueError, match=message):
        dispatch.resolve("mosaic_tpu", DENSE)
    with _on(device):
        assert dispatch.resolve("mosaic_tpu", DENSE, interpret=True).name == "mosaic_tpu"


@pytest.mark.parametrize("op", ["selected", "nsa"])
@pytest.mark.parametrize("tokens", [283_648, 283_712, 600_000])
def test_none_accepts_what_the_gradients_take_too(op, tokens):
    """A TPU v5p holds fewer keys with their gradients than without."""
    run, arrays = _calls(tokens=tokens, width=128, block=64, dtype=jnp.bfloat16)[op]

    def loss(*arrays):
        return run(*arrays).astype(jnp.float32).sum()

    with _on(V5P):
        forward = jax.make_jaxpr(run)(*arrays)
        gradients = jax.make_jaxpr(jax.grad(loss))(*arrays)
    assert _is_kernel(forward) == _is_kernel(gradients) == (tokens <= 283_648)


def test_a_name_still_runs_forward_what_its_gradients_do_not_take():
    call = dataclasses.replace(DENSE, op="selected_attention", block=64, chosen_from=400_000)
    with _on(V5P):
        assert dispatch.resolve("mosaic_tpu", call).name == "mosaic_tpu"


def test_lengths_beyond_int32_are_named():
    q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2**31, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"\{'t': 2147483648\} exceed int32, .* 2147483647"):
        dispatch.bind_attention(q=(q, "b s n h"), k=(k, "b t k h"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("op", ["compressed", "window", "interval", "dense"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_kernels_lower_for_cuda_under_their_own_names(op, tokens, dtype):
    run, arrays = _calls(tokens=tokens, heads=28, kv_heads=4, width=128, dtype=dtype)[op]
    with _on(H100):
        lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))
    part = "decode" if tokens == 1 else "fwd"
    assert re.findall(r'name = "(\w+)"', lowered.as_text()) == [f"{op}_attention_{part}"]
