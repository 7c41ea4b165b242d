"""Times `xla` native sparse attention against chunked dense attention on this machine.

    python benchmarks/attention.py --backward --out=FILE.json

Both run in one process, in turns, on the same inputs, after both were compared with their
references at a small size. Prints a table; writes FILE.json and, beside it, FILE.png.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from pallas_kernels import NSASpec, dense_attention, nsa_attention, nsa_blocks
from pallas_kernels.schedule import Cut
from pallas_kernels.selected_attention.xla import tiles

HEADS, KV_HEADS, WIDTH = 28, 4, 128  # Qwen2.5-VL-7B
SPEC = NSASpec(block_size=64, block_count=32, window_size=256)
FRAME = 64  # tokens per frame pair: one block
LIMIT = 1e-5  # relative error against the reference


def video_inputs(tokens, *, seed=0, dtype=jnp.float32):
    """q, k, v, gates, dout whose selections drift as those of a video do.

    Every frame has a content per KV head and an interest per query head. Both are random walks over
    frames: a step keeps 0.98 of the last value. A key is 0.7 content and 0.3 token noise by
    variance. A query, of standard deviation 2, is 0.1 its frame's content, 0.75 interest and 0.15
    token noise. So queries of one frame want nearly the same blocks, frames want gradually others,
    and recent blocks are only somewhat likelier than old ones.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    frame = np.arange(tokens) // FRAME

    def walk(heads, keep=0.98):
        steps = normal(frame[-1] + 1, heads, WIDTH)
        for i in range(1, len(steps)):
            steps[i] = keep * steps[i - 1] + np.sqrt(1 - keep**2) * steps[i]
        return steps

    def mix(**parts):
        return sum(np.sqrt(np.float32(share)) * part for share, part in parts.values())

    content, interest = walk(KV_HEADS), walk(HEADS)
    k = mix(content=(0.7, content[frame]), noise=(0.3, normal(tokens, KV_HEADS, WIDTH)))
    q = 2 * mix(
        content=(0.1, np.repeat(content, HEADS // KV_HEADS, axis=1)[frame]),
        interest=(0.75, interest[frame]),
        noise=(0.15, normal(tokens, HEADS, WIDTH)),
    )
    v, dout = normal(tokens, KV_HEADS, WIDTH), normal(tokens, HEADS, WIDTH)
    gates = 1 / (1 + np.exp(-normal(tokens, HEADS, 3)))
    return tuple(jnp.asarray(x[None], dtype) for x in (q, k, v, gates, dout))


def nsa(q, k, v, gates, *, spec=SPEC, implementation="xla"):
    return nsa_attention(q, k, v, gates, spec=spec, implementation=implementation)


def dense(q, k, v, gates, *, implementation="xla"):
    del gates
    pos = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    return dense_attention(
        q, k, v, start=0 * pos, query_pos=pos, key_pos=pos, implementation=implementation
    )


def forward(op):
    return lambda *arrays: op(*arrays[:4])


def forward_backward(op):
    """-> the output and the gradients of all inputs, so that nothing can be left out."""

    def run(*arrays):
        out, vjp = jax.vjp(op, *arrays[:4])
        return out, vjp(arrays[4])

    return run


PHASES = {"forward": forward, "forward+backward": forward_backward}


def check():
    """Raises ValueError if an operation or a gradient is off its reference."""
    arrays = video_inputs(1000)
    few = {"spec": NSASpec(block_size=64, block_count=4, window_size=256)}  # leaves a choice
    for op in (functools.partial(nsa, **few), dense):
        got = jax.jit(forward_backward(op))(*arrays)
        want = jax.jit(forward_backward(functools.partial(op, implementation="reference")))(*arrays)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            error = float(jnp.linalg.norm(ours - theirs) / (jnp.linalg.norm(theirs) + 1e-30))
            if not error <= LIMIT:
                raise ValueError(f"error {error:.1e} against the reference is above {LIMIT:.0e}")


def selection(arrays):
    """Blocks per query and KV head: mean chosen, mean in the union of one tile of `xla`."""
    q, k = arrays[:2]
    bits = jax.jit(functools.partial(nsa_blocks, spec=SPEC, implementation="xla"))(q, k).bits
    queries = Cut(q.shape, k.shape, tiles(SPEC.block_size)).queries
    whole = bits[:, : bits.shape[1] // queries * queries]
    union = jax.lax.reduce(
        whole.reshape(1, -1, queries, *bits.shape[2:]), jnp.uint32(0), jax.lax.bitwise_or, (2,)
    )
    count = functools.partial(jnp.sum, axis=-1)
    return tuple(
        float(count(jax.lax.population_count(x).astype(jnp.int32)).mean()) for x in (bits, union)
    )


def useful_flops(what, tokens, chosen):
    """Floating-point operations of the visible query-key pairs alone, forward."""
    t = np.arange(tokens)
    if what == "dense":
        keys = t + 1.0
    else:
        compressed, window = (t + 1) // SPEC.block_size, np.minimum(t + 1, SPEC.window_size)
        keys = compressed + window + chosen * SPEC.block_size - SPEC.block_size / 2
    return 4.0 * WIDTH * HEADS * keys.sum()


def matmul_rate():
    """Floating-point operations per second of one large float32 product: the roof."""
    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    return 2 * 2048**3 / min(_seconds(product, (x, x)) for _ in range(10))


def _seconds(run, arrays):
    begin = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    return time.perf_counter() - begin


def compiled(tokens, phases, args):
    """{(operation, phase): program}, and the inputs of all of them."""
    arrays = video_inputs(tokens, seed=args.seed, dtype=args.dtype)
    programs = {
        (op.__name__, phase): jax.jit(PHASES[phase](op)).lower(*arrays).compile()
        for phase in phases
        for op in (dense, nsa)
    }
    return programs, arrays


def measure(lengths, phases, args):
    """{(operation, phase, tokens): milliseconds of each run}.

    Everything takes turns, lengths too: a slow minute of the machine then touches all alike, and
    ratios and growth factors can be trusted more than the times themselves.
    """
    cases = {tokens: compiled(tokens, phases, args) for tokens in lengths}
    times = collections.defaultdict(list)
    begin = time.perf_counter()
    for turn in range(args.rounds):
        for tokens, (programs, arrays) in cases.items():
            for what, program in programs.items():
                times[*what, tokens].append(1e3 * _seconds(program, arrays))
        spent = time.perf_counter() - begin
        left = spent / (turn + 1) * (args.rounds - turn - 1)
        print(f"round {turn + 1} of {args.rounds}: {spent:.0f} s, {left:.0f} s left", flush=True)
    return times


def rows_of(times, roof, args):
    """One row per operation, phase and length."""
    lengths = sorted({tokens for *_, tokens in times})
    chosen = {tokens: selection(video_inputs(tokens, seed=args.seed)) for tokens in lengths}
    rows = []
    for (name, phase, tokens), samples in times.items():
        middle = float(np.median(samples))
        work = 3.5 if phase == "forward+backward" else 1.0  # the backward has 5 products for 2
        flops = work * useful_flops(name, tokens, chosen[tokens][0])
        rows.append(
            {
                "what": f"{name} {phase}",
                "tokens": tokens,
                "input": f"video, seed {args.seed}, {args.dtype}",
                "mean_union": chosen[tokens][1] if name == "nsa" else None,
                "ms_median": middle,
                "ms_p10": float(np.percentile(samples, 10)),
                "ms_p90": float(np.percentile(samples, 90)),
                "ratio_to_dense": float(np.median(times["dense", phase, tokens])) / middle,
                "roofline_fraction": flops / (middle / 1e3 * roof),
            }
        )
    return sorted(rows, key=lambda row: row["tokens"])


def growth(rows, row):
    """Time of `row` over that at half its tokens, None where that was not measured."""
    half = [r for r in rows if r["what"] == row["what"] and 2 * r["tokens"] == row["tokens"]]
    return row["ms_median"] / half[0]["ms_median"] if half else None


def print_rows(rows):
    for row in rows:
        factor, union = growth(rows, row), row["mean_union"]
        print(
            f"{row['what']:24} {row['tokens']:7} {row['ms_median']:11.1f} "
            f"{row['ms_p10']:11.1f} {row['ms_p90']:11.1f} "
            f"{'' if factor is None else format(factor, '.2f'):>7} {row['ratio_to_dense']:9.2f} "
            f"{row['roofline_fraction']:9.2f} {'' if union is None else format(union, '.1f'):>6}"
        )


def plot(rows, path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for what in dict.fromkeys(row["what"] for row in rows):
        line = [(row["tokens"], row["ms_median"] / 1e3) for row in rows if row["what"] == what]
        dash = "--" if what.startswith("dense") else "-"
        axes.loglog(*zip(*line, strict=True), dash, marker="o", base=2, label=what)
    axes.set(xlabel="tokens", ylabel="seconds", title=f"{HEADS}/{KV_HEADS} heads of {WIDTH}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def device_name():
    """The accelerator, or the processor and its number of cores."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backward", action="store_true", help="also time forward + backward")
    parser.add_argument("--tokens", default="4096,8192,16384,32768", help="lengths, by comma")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20, help="runs of each, taking turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json")
    args = parser.parse_args()

    check()
    roof = matmul_rate()
    device = device_name()
    print(
        f"{device}; roof {roof / 1e9:.0f} GFLOP/s; errors against the references below {LIMIT:.0e}"
    )
    lengths = [int(tokens) for tokens in args.tokens.split(",")]
    rows = rows_of(measure(lengths, list(PHASES)[: 1 + args.backward], args), roof, args)
    print(
        f"{'what':24} {'tokens':>7} {'median ms':>11} {'p10':>11} {'p90':>11} {'growth':>7} "
        f"{'vs dense':>9} {'roofline':>9} {'union':>6}"
    )
    print_rows(rows)
    versions = {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"device": device, "versions": versions, "rows": rows}, indent=1) + "\n"
    )
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
