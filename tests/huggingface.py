"""Small random Qwen2.5-VL models in PyTorch, and their weights and inputs as arrays."""

import numpy as np
import torch
import transformers

from convert.models.qwen2_5_vl import rows
from convert.weights import names
from tests.small_models import END, IMAGE, PAD, VIDEO
from videonsa_jax.config.schema import ModelConfig


def torch_config(cfg: ModelConfig) -> transformers.Qwen2_5_VLConfig:
    """The configuration of stock Qwen2.5-VL of these sizes."""
    text, vision = cfg.text, cfg.vision
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.d_model,
            "intermediate_size": text.d_ff,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "rms_norm_eps": text.norm_eps,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": list(text.mrope_section),
                "rope_theta": text.rope_theta,
            },
            "tie_word_embeddings": text.tie_embeddings,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": vision.num_layers,
            "hidden_size": vision.d_model,
            "intermediate_size": vision.d_ff,
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
            "window_size": vision.window_pixels,
            "out_hidden_size": text.d_model,
            "fullatt_block_indexes": list(vision.full_attention_layers),
            "tokens_per_second": int(cfg.tokens_per_second),
        },
        image_token_id=cfg.image_token_id,
        video_token_id=cfg.video_token_id,
        vision_start_token_id=cfg.vision_start_token_id,
        vision_end_token_id=END,
        tie_word_embeddings=text.tie_embeddings,
        attn_implementation="eager",
    )


def torch_model(cfg: ModelConfig, seed: int) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL of these sizes with random parameters, float32, eager attention."""
    model = transformers.Qwen2_5_VLForConditionalGeneration(torch_config(cfg))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if name.endswith("norm.weight") or "norm" in name.split(".")[-2] or "ln_q" in name:
                param.copy_(1 + 0.3 * noise)
            elif param.ndim == 1:
                param.copy_(0.5 * noise)
            else:
                param.copy_(1.2 * noise / param[0].numel() ** 0.5)
    return model.eval()


def tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors that a checkpoint of this model holds, by canonical name."""
    state = model.state_dict()
    if model.config.text_config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {names.canonical(name, rows.PREFIXES): value.numpy() for name, value in state.items()}


def torch_inputs(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """With the token types, without which `transformers` 5 silently uses 1-D positions."""
    ids = arrays["input_ids"]
    types = (ids == IMAGE) + 2 * (ids == VIDEO)
    return {k: torch.from_numpy(v) for k, v in {**arrays, "mm_token_type_ids": types}.items()}
