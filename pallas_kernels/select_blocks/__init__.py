"""select_blocks: api.py (contract), ref.py (the formula), xla.py (any platform), and kernels.

triton.py runs on GPUs, mosaic_tpu.py on TPUs.
"""
