"""Small models and prompts for tests.

Sizes differ from each other wherever they may, so that a forgotten transpose shows; every norm,
bias and kernel is random and large enough to matter.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videonsa_jax.batch import Batch
from videonsa_jax.config.schema import (
    ComputeConfig,
    ModelConfig,
    NSAConfig,
    TextConfig,
    VisionConfig,
)
from videonsa_jax.data import hf_inputs, pack
from videonsa_jax.data.sample import Sample
from videonsa_jax.model.model import VideoNSA

IMAGE, VIDEO, START, END = 90, 91, 92, 93
VOCAB = 97
PAD = 0


def config(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    attention: str = "dense",
    nsa: NSAConfig = NSAConfig(block_size=4, block_count=2, window_size=6),  # noqa: B008 (frozen)
) -> ModelConfig:
    """Two decoder layers and three vision layers, one of them full attention."""
    return ModelConfig(
        text=TextConfig(
            vocab_size=VOCAB,
            d_model=heads * 12,
            d_ff=44,
            num_layers=2,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=12,
            mrope_section=(1, 2, 3),
            rope_theta=1_000.0,
            norm_eps=1e-5,
            tie_embeddings=tied,
        ),
        vision=VisionConfig(
            d_model=24,
            d_ff=40,
            num_layers=3,
            num_heads=3,
            full_attention_layers=(1,),
            patch_size=4,
            window_pixels=16,
        ),
        nsa=nsa,
        attention=attention,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
    )


def abstract_params(cfg: ModelConfig) -> tuple[nnx.GraphDef, dict]:
    """The model without arrays: its structure, and shapes as a nested dict."""
    compute = ComputeConfig(dtype="float32", remat="none")
    model = nnx.eval_shape(lambda: VideoNSA(cfg, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def random_params(cfg: ModelConfig, seed: int) -> dict:
    """Kernels that keep the scale of their input, norms around 1, biases around 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        if path[-1].key == "scale":
            return jnp.asarray(1 + 0.3 * noise, jnp.float32)
        wide = 0.5 if path[-1].key == "bias" else 1.2 * cfg.text.d_model**-0.5
        return jnp.asarray(wide * noise, jnp.float32)

    return jax.tree.map_with_path(draw, abstract_params(cfg)[1])


def build(cfg: ModelConfig, params: dict) -> VideoNSA:
    """A float32 model with these parameters."""
    return nnx.merge(abstract_params(cfg)[0], params)


@dataclasses.dataclass(frozen=True)
class Vision:
    """One image or video of a prompt."""

    grid: tuple[int, int, int]
    is_video: bool = True
    seconds: float = 1.0


def inputs(
    prompts: list[list[int | Vision]], cfg: ModelConfig, *, padding: str, seed: int
) -> dict[str, np.ndarray]:
    """The processor's arrays for prompts of text (as token counts) and images and videos."""
    rng = np.random.default_rng(seed)
    rows = [_row(prompt, cfg, rng) for prompt in prompts]
    length = max(len(row) for row in rows)
    width = [(length - len(r), 0) if padding == "left" else (0, length - len(r)) for r in rows]
    ids = np.stack([np.pad(r, w, constant_values=PAD) for r, w in zip(rows, width, strict=True)])
    mask = np.stack([np.pad(np.ones(len(r), int), w) for r, w in zip(rows, width, strict=True)])
    out = {"input_ids": ids, "attention_mask": mask}
    visuals = [part for prompt in prompts for part in prompt if isinstance(part, Vision)]
    kinds = (
        ("pixel_values_videos", "video_grid_thw", True),
        ("pixel_values", "image_grid_thw", False),
    )
    for pixels, grids, is_video in kinds:
        if chosen := [visual for visual in visuals if visual.is_video == is_video]:
            out[grids] = np.array([visual.grid for visual in chosen])
            shape = (out[grids].prod(axis=1).sum(), cfg.vision.patch_elements)
            out[pixels] = rng.standard_normal(shape).astype(np.float32)
    if "video_grid_thw" in out:
        seconds = [visual.seconds for visual in visuals if visual.is_video]
        out["second_per_grid_ts"] = np.array(seconds, np.float32)
    return out


def _row(prompt: list[int | Vision], cfg: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    parts = []
    for part in prompt:
        if isinstance(part, Vision):
            count = int(np.prod(part.grid)) // cfg.vision.merge_size**2
            parts += [[START], [VIDEO if part.is_video else IMAGE] * count, [END]]
        else:
            parts.append(rng.integers(1, IMAGE, part))
    return np.concatenate(parts).astype(np.int64)


def samples(arrays: dict[str, np.ndarray], cfg: ModelConfig) -> list[Sample]:
    """One sample per row; the last text after the last image or video is the answer."""
    out = []
    for sample in hf_inputs.to_samples(arrays, cfg)[0]:
        after = int(np.flatnonzero(np.isin(sample.tokens, [IMAGE, VIDEO, END])).max(initial=0)) + 1
        weights = (np.arange(len(sample.tokens)) > after).astype(np.float32)
        out.append(dataclasses.replace(sample, loss_weights=weights))
    return out


def batch(
    rows: list[list[Sample]], cfg: ModelConfig, *, spare: int = 0, like: Batch | None = None
) -> Batch:
    """Rows of packed samples, in slots that just fit them, with `spare` more, or as in `like`."""
    if like is not None:
        bucket = pack.Bucket(like.vision_order.shape[1], like.text_order.shape[1])
        return Batch(**pack.pack(rows, bucket, cfg), frame_patches=like.frame_patches)
    needed = np.max([pack.row_tokens(row, cfg) for row in rows], axis=0)
    bucket = pack.Bucket(*(int(n) + spare for n in needed))
    grids = [visual.grid for row in rows for sample in row for visual in sample.visuals]
    fields = pack.pack(rows, bucket, cfg)
    return Batch(**fields, frame_patches=pack.frame_patches(grids, cfg))
