"""The prefill of Qwen2.5-VL-7B over one long video, as a function of abstract arrays."""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.inputs import FRAME_PATCHES
from videonsa_jax.batch import Batch
from videonsa_jax.config import PRESETS, ComputeConfig, VisionConfig
from videonsa_jax.generate import prefill
from videonsa_jax.model import VideoNSA

PRESET = "qwen2_5_vl_7b"
NEW_TOKENS = 128


def prefill_case(tokens: int, text_tokens: int):
    """-> (run, (params, batch)): bfloat16 parameters, sparse attention, room for `NEW_TOKENS`."""
    cfg, compute = PRESETS[PRESET], ComputeConfig(remat="none")
    model = nnx.eval_shape(lambda: VideoNSA(cfg, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)

    def run(params, batch):
        return prefill(nnx.merge(graphdef, params), batch, NEW_TOKENS)

    return run, (params, _batch(tokens, text_tokens, cfg.vision))


def _batch(tokens: int, text_tokens: int, vision: VisionConfig) -> Batch:
    """One row: `tokens` vision tokens, `text_tokens` of text."""
    patches = tokens * vision.merge_size**2

    def ints(*shape):
        return jax.ShapeDtypeStruct((1, *shape), jnp.int32)

    def floats(*shape):
        return jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    return Batch(
        text_tokens=ints(text_tokens),
        text_targets=ints(text_tokens),
        text_weights=floats(text_tokens),
        text_positions=ints(text_tokens, 3),
        text_order=ints(text_tokens),
        text_start=ints(text_tokens),
        vision_positions=ints(tokens, 3),
        vision_order=ints(tokens),
        vision_start=ints(tokens),
        vision_segment=ints(tokens),
        vision_slot=ints(tokens),
        patches=floats(patches, vision.patch_elements),
        patch_positions=ints(patches, 2),
        patch_window=ints(patches, 2),
        patch_frame=ints(patches, 2),
        frame_patches=FRAME_PATCHES,
    )
