"""nsa_attention: api.py (contract), ref.py (the references), triton.py (one operation on GPUs)."""
