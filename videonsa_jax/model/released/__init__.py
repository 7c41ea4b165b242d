"""Attention as the released VideoNSA code computes it, each difference from the paper switchable.

The released weights were evaluated with this function; docs/released_semantics.md describes it.
"""
