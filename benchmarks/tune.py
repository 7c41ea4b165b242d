"""Tries block sizes of the Triton kernels: those in `pallas_kernels/block_sizes/triton.py`.

    python benchmarks/tune.py --kernels=selected_attention --dtype=bfloat16
    make aot && JAX_PLATFORMS=cpu .venv-aot/bin/python -m benchmarks.tune --compile

The first times each choice on this machine's GPU, on inputs that drift like a video, and prints the
fastest as a line for `MEASURED`. The second runs in `.venv-aot` and compiles each choice for
an H100 that is not there: it shows which choices keep their values in registers and fit into shared
memory, which is what `DEFAULTS` is chosen by; it says nothing of speed.
"""

import argparse
import functools
import itertools
import statistics
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.aot.cases import backward_cases, forward_cases, gradients
from benchmarks.aot.target import TARGETS
from benchmarks.inputs import WIDTH
from benchmarks.timing import programs
from benchmarks.timing.interleaved import calls_per_sample, seconds
from pallas_kernels import block_sizes
from videonsa_jax.aot.compile import CompilationError

ROUNDS = 20
OPERATIONS = {  # kernel -> the operation that runs it
    "dense_attention": "dense_attention",
    "compressed_attention": "compressed_attention",
    "window_attention": "window_attention",
    "interval_attention": "interval_attention",
    "decode_attention": "decode",
    "block_scores": "select_blocks",
    "top_blocks": "select_blocks",
    "selected_attention": "selected_attention",
    "attention_dq": "compressed_attention",
    "attention_dkv": "compressed_attention",
    "selected_attention_dq": "selected_attention",
    "selected_attention_dkv": "selected_attention",
}
BACKWARD = ("_dq", "_dkv")  # the ends of the names of kernels for gradients
ROWS, KEYS, WARPS, STAGES = (16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)


def candidates(kernel, default):
    """The choices for one kernel; sizes that it does not read keep their default."""
    rows, keys, stages = ROWS, KEYS, STAGES
    if kernel == "decode_attention":
        rows = (default.block_q,)
    if kernel.startswith("selected_attention"):
        keys = (default.block_kv,)
    if kernel == "top_blocks":
        rows, keys, stages = (1, 2, 4, 8), (default.block_kv,), (1,)
    for choice in itertools.product(rows, keys, WARPS, stages):
        yield block_sizes.triton.TuningConfig(*choice)


def choices(kernel, args):
    """Each choice in turn, in force while it is at hand."""
    key = kernel, jnp.dtype(args.dtype).itemsize, args.head_width
    for params in candidates(kernel, block_sizes.triton.DEFAULTS[key]):
        with (
            mock.patch.dict(block_sizes.triton.MEASURED, clear=True),
            mock.patch.dict(block_sizes.triton.DEFAULTS, {key: params}),
        ):
            jax.clear_caches()
            yield params


def compile_all(kernel, args):
    """Prints what each choice uses when compiled for an H100."""
    cases_of = backward_cases if kernel.endswith(BACKWARD) else forward_cases
    cases = cases_of(args.tokens, implementation="triton", dtype=args.dtype, width=args.head_width)
    (case,) = (case for case in cases if case.name == OPERATIONS[kernel])
    for params in choices(kernel, args):
        try:
            uses = TARGETS["h100"].compile_operation(case.run, case.arguments).kernels
        except CompilationError as error:
            print(f"{params}: {str(error)[:160]}", flush=True)
            continue
        for use in uses:
            print(
                f"{params}: {use.name} {use.registers} registers, {use.spill_bytes} spilled, "
                f"{use.shared_bytes} shared, {use.wgmma} wgmma",
                flush=True,
            )


def time_all(kernel, args):
    """Prints the median time of each choice, and the fastest as a line for `MEASURED`."""
    arrays = programs.inputs("video", args.tokens, args)
    dense = functools.partial(programs.dense, implementation="triton"), arrays[:4]
    operations = {
        "dense_attention": dense,
        "interval_attention": programs.vision_frames(args.tokens, args.dtype),
        **programs.stages(arrays),
        **programs.decoding(args.tokens, 1, args.dtype),
    }
    op, arrays = operations[OPERATIONS[kernel]]
    if kernel.endswith(BACKWARD):
        op = gradients(op, arrays)
    times = {}
    for params in choices(kernel, args):
        try:
            run = jax.jit(op).lower(*arrays).compile()
        except jax.errors.JaxRuntimeError as error:
            print(f"{params}: {str(error).splitlines()[0][:160]}", flush=True)
            continue
        calls = calls_per_sample(run, arrays)
        times[params] = statistics.median(seconds(run, arrays, calls) for _ in range(ROUNDS))
        print(f"{params}: {1e3 * times[params]:.3f} ms", flush=True)
    best = min(times, key=times.get)
    size, device = jnp.dtype(args.dtype).itemsize, jax.devices()[0].device_kind
    print(f"    ({device!r}, {kernel!r}, {size}, {args.head_width}): {best},")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", default=",".join(OPERATIONS), help="by comma")
    parser.add_argument("--dtype", default="bfloat16", choices=block_sizes.triton.DTYPES)
    parser.add_argument(
        "--head_width", type=int, default=WIDTH, choices=block_sizes.triton.HEAD_WIDTHS
    )
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="for an H100 that is not there")
    args = parser.parse_args()
    for kernel in args.kernels.split(","):
        print(f"{kernel}, {args.dtype}, heads of {args.head_width}, {args.tokens} tokens")
        (compile_all if args.compile else time_all)(kernel, args)


if __name__ == "__main__":
    main()
