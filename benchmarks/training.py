"""Times training steps of one model with sparse and with dense attention on this machine.

    python benchmarks/training.py --out=FILE.json [--vision=32768] [--text=1024] [--rows=1]

The model is a Qwen2.5-VL of the 1B class (1.6 billion parameters in the decoder with its gates, 0.7
billion in the vision tower), or `--preset`, in bfloat16 with AdamW. A row is a random video and
random text. Prints, and writes to FILE.json, for each attention: seconds a step, tokens a second,
peak memory, and MFU: the needed operations (`videonsa_jax/aot/flops.py`) over what the device could
do at its stated peak.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import numpy as np

from benchmarks.device import device_name, gpu_state
from videonsa_jax.aot.flops import row_flops
from videonsa_jax.aot.topology import CHIPS
from videonsa_jax.batch import Batch
from videonsa_jax.config.run import RunConfig
from videonsa_jax.config.schema import (
    PRESETS,
    ComputeConfig,
    DataConfig,
    ModelConfig,
    TextConfig,
    TrainConfig,
)
from videonsa_jax.data.pack import Bucket, frame_patches, pack
from videonsa_jax.data.sample import Sample, Visual
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import Optimizer
from videonsa_jax.training.step import CompiledStep

FRAME = (16, 16)  # patches of a frame pair: 64 tokens
WARM_UP = 2  # steps
BASE = PRESETS["qwen2_5_vl_7b"]
MODELS = {
    "1b": dataclasses.replace(  # the decoder of Qwen2.5-1.5B
        BASE,
        text=TextConfig(
            vocab_size=151_936,
            d_model=1536,
            d_ff=8960,
            num_layers=28,
            num_heads=12,
            num_kv_heads=2,
            head_dim=128,
            mrope_section=(16, 24, 24),
            tie_embeddings=True,
        ),
    ),
    **PRESETS,
}


def random_batch(model: ModelConfig, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Rows of one video and text after it, as arrays of a `Batch`."""
    rng = np.random.default_rng(args.seed)
    words = min(model.text.vocab_size, model.vision_start_token_id)
    height, width = FRAME
    grid = (args.vision * model.vision.merge_size**2 // (height * width), height, width)

    def sample():
        text = rng.integers(0, words, args.text).astype(np.int32)
        video = np.full(args.vision, model.video_token_id, np.int32)
        weights = np.concatenate([np.zeros(args.vision + 1), np.ones(args.text - 1)])
        size = (4 * args.vision, model.vision.patch_elements)
        patches = rng.standard_normal(size, np.float32)
        visual = Visual(patches, grid, is_video=True)
        return Sample(np.concatenate([video, text]), weights.astype(np.float32), (visual,))

    bucket = Bucket(vision_tokens=args.vision, text_tokens=args.text)
    arrays = pack([[sample()] for _ in range(args.rows)], bucket, model)
    return arrays | {"frame_patches": frame_patches([grid], model)}


def measure(attention: str, args: argparse.Namespace) -> dict:
    """Times one attention: a row of the report."""
    model = dataclasses.replace(MODELS[args.preset], attention=attention)
    arrays = random_batch(model, args)
    flops = (
        args.rows
        * row_flops(
            model,
            vision_tokens=args.vision,
            text_tokens=args.text,
            frame_patches=arrays["frame_patches"],
        ).training
    )
    compile_s, times, loss = _train(model, arrays, args)
    device = jax.devices()[0]
    peak = next((x.flops for x in CHIPS.values() if x.kind == device.device_kind), None)
    seconds = float(np.median(times))
    return {
        "attention": attention,
        "step_s_median": seconds,
        "step_s_p10": float(np.percentile(times, 10)),
        "step_s_p90": float(np.percentile(times, 90)),
        "tokens_per_s": args.rows * (args.vision + args.text) / seconds,
        "model_flops": flops,
        "mfu": None if peak is None else flops / seconds / peak,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_s": compile_s,
        "loss": loss,
        "device": device_name(),
        "gpu": gpu_state(),
    }


def _train(model, arrays, args):
    """-> seconds of compilation, of each step after the first ones, and the last loss."""
    cfg = RunConfig(
        model=model,
        seed=args.seed,
        compute=ComputeConfig(dtype=args.dtype, remat=args.remat),
        data=DataConfig(source=("random",), tokenizer="none", batch=args.rows),
        train=TrainConfig(steps=args.steps + WARM_UP),
    )
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    optimizer = Optimizer(cfg.optim, cfg.train.steps)
    graphdef, layouts = state_lib.abstract_model(cfg, mesh)
    abstract = state_lib.abstract_state(layouts, optimizer, mesh)
    step = CompiledStep(graphdef, optimizer, state_lib.shardings(abstract), mesh)
    times = []
    with jax.set_mesh(mesh):
        state = state_lib.initial_state(cfg, optimizer, abstract)
        batch = jax.device_put(Batch(**arrays))
        compile_s = step.compile(state, batch)
        for _ in range(args.steps + WARM_UP):
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            loss = float(metrics["loss"])  # waits for the step
            times.append(time.perf_counter() - begin)
            if not math.isfinite(loss):
                raise ValueError(f"the loss of {model.attention} attention is {loss}")
    return compile_s, times[WARM_UP:], loss


def print_rows(rows: list[dict]) -> None:
    """One line per attention."""
    for row in rows:
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.1f} GiB"
        print(
            f"{row['attention']}: {row['step_s_median']:.3f} s a step, "
            f"{row['tokens_per_s']:.0f} tokens/s{mfu}{peak}, loss {row['loss']:.3f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=MODELS, default="1b")
    parser.add_argument("--attention", default="paper,dense", help="modes, by comma")
    parser.add_argument("--vision", type=int, default=32_768, help="tokens, a multiple of 64")
    parser.add_argument("--text", type=int, default=1024, help="tokens after them")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--remat", choices=("none", "dots", "save_selection", "full"), default="save_selection"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.json")
    args = parser.parse_args()
    # A process for each, or the peak of the first one's memory would hide the second one's.
    alone = {"max_workers": 1, "max_tasks_per_child": 1, "mp_context": get_context("spawn")}
    with ProcessPoolExecutor(**alone) as pool:
        rows = [pool.submit(measure, x, args).result() for x in args.attention.split(",")]
    print_rows(rows)
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    settings = vars(args) | {"out": args.out.name}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"settings": settings, "versions": versions, "rows": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
