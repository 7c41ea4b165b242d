"""VideoNSA-7B: Qwen2.5-VL-7B-Instruct fine-tuned on LLaVA-Video-178K (arXiv:2510.02295, app. B).

python train.py --config=configs/videonsa_7b_sft.py --workdir=runs/videonsa_7b

The paper's recipe, split over 8 GPUs; configs/videonsa_7b_sft.py:pod64 and :pod256 split the same
rows over 64 chips of TPU v5p and over 256 of v5e or v6e. It starts from `train.init_from`,
Qwen2.5-VL's weights as `python -m convert from-hf` writes them, and reads the dataset's JSON files
and videos under data/llava_video_178k. The variant configs/videonsa_7b_sft.py:smoke takes the same
data through a tiny model on one device.
"""

from ml_collections import ConfigDict

# Mesh, sharding strategy, parts of a step one after the other: together 32 rows a step.
SPLITS = {
    "full": (dict(fsdp=8), "fsdp", 4),
    "pod64": (dict(fsdp=32, context=2), "fsdp_cp", 1),
    "pod256": (dict(fsdp=32, context=8), "fsdp_cp", 1),
    "smoke": (dict(fsdp=1), "fsdp", 1),
}


def get_config(variant: str = "full") -> ConfigDict:
    """`variant`: "full", "pod64", "pod256", or "smoke" for 20 steps of a tiny model."""
    if variant not in SPLITS:
        raise ValueError(f"{variant=} must be one of {list(SPLITS)}")
    c = ConfigDict()
    c.seed = 42
    c.model = dict(preset="qwen2_5_vl_7b", nsa=dict(block_size=64, block_count=32, window_size=256))
    c.compute = dict(dtype="bfloat16", remat="full")
    c.mesh, c.sharding, grad_accum_steps = SPLITS[variant]
    c.data = dict(
        source=("data/llava_video_178k/train.jsonl",),
        tokenizer="weights/qwen2_5_vl_7b_instruct",
        fps=4.0,
        frame_count_range=(350, 550),
        max_pixels=50_176,
        batch=32,
        buckets=((12_800, 1_024), (17_920, 2_048)),  # 550 frames: 275 pairs of 64 tokens
        workers=8,
    )
    c.optim = dict(
        lr=1e-6,
        warmup_ratio=0.1,
        b1=0.9,
        b2=0.999,
        weight_decay=0.01,
        clip_norm=1.0,
        grad_accum_steps=grad_accum_steps,
    )
    c.train = dict(
        steps=6_750,  # 216K samples, 32 a step
        log_every=10,
        save_every=200,
        init_from="weights/qwen2_5_vl_7b_jax",
    )
    if variant == "smoke":
        c.model = dict(preset="tiny", text=dict(vocab_size=152_064))
        c.data.update(fps=0.5, max_frames=16, batch=2, buckets=((512, 512),), workers=0)
        c.data.frame_count_range = None
        c.optim.lr = 1e-3
        c.train = dict(steps=20, log_every=1, save_every=10)
    return c
