"""Softmax attention under a `KeyRangeMask`, by every backend.

mask.py (what a query sees), params.py (what is static), attention_kernels.py (a forward and a
backward kernel as one differentiable function), one file or two per backend, and what they share.
"""
