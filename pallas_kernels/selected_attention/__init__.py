"""selected_attention: api.py (contract), ref.py (the formula), xla.py (any platform), and kernels.

triton*.py run on GPUs, mosaic_tpu*.py on TPUs.
"""
