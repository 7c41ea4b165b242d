"""Qwen2.5-VL: its weights and its config.json."""
