"""dense_attention: api.py (contract), ref.py (oracle), xla.py (any backend), and kernels.

triton.py runs on GPUs, mosaic_tpu.py and splash.py on TPUs; part.py attends to some of the keys.
"""
