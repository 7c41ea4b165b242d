"""selected_attention: api.py (contract), ref.py (oracle), xla.py (any backend), and kernels.

triton.py and triton_backward.py run on GPUs, mosaic_tpu.py and mosaic_backward.py on TPUs; part.py
runs any of them over some of the keys.
"""
