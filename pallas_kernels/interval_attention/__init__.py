"""interval_attention: api.py (contract), ref.py (the formula)."""
