"""block_mean: api.py (contract), ref.py (the formula)."""
