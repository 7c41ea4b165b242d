"""compressed_attention: api.py (contract), ref.py (oracle), xla.py (any backend), and kernels.

triton.py runs on GPUs, mosaic_tpu.py on TPUs.
"""
