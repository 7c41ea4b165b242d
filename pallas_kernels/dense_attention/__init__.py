"""dense_attention: api.py (contract), ref.py (the formula), mosaic_tpu.py and splash.py (TPUs)."""
