"""VideoNSA in JAX: Qwen2.5-VL with native sparse attention over video tokens."""

import importlib

_HOMES = {  # public name -> module; imported on first use, so that data workers never import JAX
    "PRESETS": "config.schema",
    "Batch": "batch",
    "Cache": "batch",
    "ComputeConfig": "config.schema",
    "ModelConfig": "config.schema",
    "NSAConfig": "config.schema",
    "TextConfig": "config.schema",
    "VideoNSA": "model.model",
    "VisionConfig": "config.schema",
    "next_token_loss": "training.loss",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
