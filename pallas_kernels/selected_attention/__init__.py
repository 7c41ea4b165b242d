"""selected_attention: api.py (contract), ref.py (oracle), xla.py (any backend), triton.py (GPU)."""
