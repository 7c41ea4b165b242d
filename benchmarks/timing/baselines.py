"""Times one public implementation of native sparse attention, in PyTorch, on this machine's GPU.

    PYTHON -m benchmarks.timing.baselines --baseline=fla --tokens=8192,16384 --out=FILE.json

`benchmarks/attention.py --baselines=PYTHON` starts it. Needs PyTorch with CUDA and the baseline's
package:

    fla        pip install flash-linear-attention flash-attn
    xunhaolai  https://github.com/XunhaoLai/native-sparse-attention-triton, flash-attn
    mdy666     https://github.com/mdy666/Scalable-Flash-Native-Sparse-Attention
    torch      nothing else: dense attention by cuDNN, which every baseline is divided by

A baseline first runs at a length at which all blocks are selected, where every rule of selection
must agree with plain masks; then it and dense attention are timed in turns. What they do otherwise:
fla takes groups of 16 heads or more, so each group of 7 is padded with heads of zeros, which its
time includes, and always selects the first and the two latest blocks. The others are given this
project's rule: the own block, no first block.
"""

import argparse
import importlib
import json
import pathlib
import statistics
import time

import numpy as np
import torch

from benchmarks.inputs import (
    BLOCK_COUNT,
    BLOCK_SIZE,
    HEADS,
    INPUTS,
    KV_HEADS,
    WIDTH,
    WINDOW_SIZE,
)

LIMIT = 2e-2  # relative error in bfloat16
CHECKED = BLOCK_SIZE * BLOCK_COUNT  # tokens: all blocks are selected
ROUNDS, CALLS = 20, 5
GROUP = HEADS // KV_HEADS


def dense(q, k, v, gates):
    del gates
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=True
        )
    return out.transpose(1, 2)


def fla():
    parallel = importlib.import_module("fla.ops.nsa.parallel")

    def padded(x):
        """Heads [.. 28 ..] -> [.. 64 ..]: 7 heads of each group and 9 of zeros."""
        x = x.unflatten(2, (KV_HEADS, GROUP))
        zeros = x.new_zeros(*x.shape[:3], 16 - GROUP, *x.shape[4:])
        return torch.cat([x, zeros], dim=3).flatten(2, 3)

    def run(q, k, v, gates):
        out = parallel.parallel_nsa(
            padded(q),
            k,
            v,
            *padded(gates).unbind(-1),
            block_counts=BLOCK_COUNT,
            block_size=BLOCK_SIZE,
            window_size=WINDOW_SIZE,
        )
        return out.unflatten(2, (KV_HEADS, 16))[:, :, :, :GROUP].flatten(2, 3)

    return run


def xunhaolai():
    ops = importlib.import_module("native_sparse_attention.ops")
    flash = importlib.import_module("flash_attn")

    def run(q, k, v, gates):
        q0, k0, v0 = q[0], k[0], v[0]
        ends = torch.tensor([0, len(q0)], dtype=torch.int32, device="cuda")
        (kc, means), (vc, _) = (
            ops.avgpool_compress(x, None, ends, BLOCK_SIZE, BLOCK_SIZE, None) for x in (k0, v0)
        )
        compressed, chosen = ops.compressed_attention(
            q0,
            kc,
            vc,
            BLOCK_SIZE,
            BLOCK_SIZE,
            BLOCK_SIZE,
            BLOCK_COUNT,
            ends,
            means,
            init_blocks=0,
            local_blocks=1,
        )
        selected = ops.topk_sparse_attention(q0, k0, v0, chosen, BLOCK_SIZE, ends)
        window = flash.flash_attn_func(q, k, v, causal=True, window_size=(WINDOW_SIZE - 1, 0))[0]
        branches = torch.stack([compressed, selected, window], dim=-1)
        return (branches * gates[0, :, :, None]).sum(-1)[None]

    return run


def mdy666():
    package = importlib.import_module("flash_nsa")
    config = package.NSAConfig(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=WIDTH,
        kernel_size=BLOCK_SIZE,
        stride=BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        top_n=BLOCK_COUNT,
        num_init_blocks=0,
        num_local_blocks=1,
        window_size=WINDOW_SIZE,
    )
    layer = package.HFNSACore(config).to(device="cuda", dtype=torch.bfloat16)

    def run(q, k, v, gates):
        ends = torch.tensor([0, q.shape[1]], dtype=torch.int32, device="cuda")
        return layer(q[0], k[0], v[0], torch.logit(gates[0]), ends)[None]  # it takes the sigmoid

    return run


MAKERS = {"torch": lambda: dense, "fla": fla, "xunhaolai": xunhaolai, "mdy666": mdy666}


def reference(q, k, v, gates):
    """The three branches with all blocks selected, by masks, in float32."""
    k, v = (x.repeat_interleave(GROUP, dim=2).float() for x in (k, v))
    means = [x.unflatten(1, (-1, BLOCK_SIZE)).mean(2) for x in (k, v)]
    key = torch.arange(q.shape[1], device="cuda")
    query, last = key[:, None], key[BLOCK_SIZE - 1 :: BLOCK_SIZE]
    causal = key <= query
    views = (
        (*means, last <= query),
        (k, v, causal),
        (k, v, causal & (key > query - WINDOW_SIZE)),
    )
    out = 0
    for branch, (keys, values, see) in enumerate(views):
        logits = torch.einsum("bsnh,btnh->bnst", q.float(), keys) * WIDTH**-0.5
        weights = torch.softmax(logits.masked_fill(~see, -torch.inf), dim=-1).nan_to_num()
        part = torch.einsum("bnst,btnh->bsnh", weights, values)
        out = out + gates[..., branch, None].float() * part
    return out


def inputs(source, tokens, seed):
    arrays = INPUTS[source](tokens, seed=seed)[:4]
    return tuple(torch.from_numpy(x).to("cuda", torch.bfloat16) for x in arrays)


def check(run):
    """Raises ValueError if a baseline is off the masks."""
    arrays = inputs("video", CHECKED, seed=0)
    got, want = run(*arrays).float(), reference(*arrays)
    error = float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))
    if not error <= LIMIT:
        raise ValueError(f"error {error:.1e} against plain masks is above {LIMIT:.0e}")


def milliseconds(run, arrays):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        run(*arrays)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / CALLS


def rows_of(name, run, source, tokens, seed):
    """The baseline and dense attention, in turns; rows as in attention.py."""
    arrays = inputs(source, tokens, seed)
    runs = {"dense": dense, name: run}
    times = {what: [] for what in runs}
    for op in runs.values():
        milliseconds(op, arrays)  # compiles and tunes
    for _ in range(ROUNDS):
        for what, op in runs.items():
            times[what].append(milliseconds(op, arrays))
    middle = {what: statistics.median(samples) for what, samples in times.items()}
    return [
        {
            "what": f"{what} forward, process of {name}",
            "tokens": tokens,
            "input": f"{source}, seed {seed}, bfloat16",
            "mean_union": None,
            "ms_median": middle[what],
            "ms_p10": float(np.percentile(samples, 10)),
            "ms_p90": float(np.percentile(samples, 90)),
            "ratio_to_dense": middle["dense"] / middle[what],
            "roofline_fraction": None,
        }
        for what, samples in times.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--baseline", choices=MAKERS, required=True)
    parser.add_argument("--tokens", default="8192,16384,32768,65536,131072")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json")
    args = parser.parse_args()
    run = MAKERS[args.baseline]()
    rows = []
    with torch.no_grad():
        if args.baseline != "torch":
            check(run)
        for tokens in (int(tokens) for tokens in args.tokens.split(",")):
            for source in INPUTS:
                rows += rows_of(args.baseline, run, source, tokens, args.seed)
    args.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
