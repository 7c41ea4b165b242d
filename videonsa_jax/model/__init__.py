"""Qwen2.5-VL with native sparse attention: modules of parameters and equations, and generation."""
