"""Every kernel with tile sizes can be tuned, and a choice is in force only while it is tried."""

import argparse

from benchmarks import tune
from pallas_kernels import block_sizes


def test_every_kernel_has_an_operation():
    assert set(tune.OPERATIONS) == {kernel for kernel, *_ in block_sizes.triton.DEFAULTS}


def test_choices_take_the_place_of_the_table_in_turn():
    args = argparse.Namespace(dtype="bfloat16", head_width=128)
    before = block_sizes.triton.pick("block_scores", "NVIDIA H200", "bfloat16", 128)
    tried = 0
    for choice in tune.choices("block_scores", args):
        assert block_sizes.triton.pick("block_scores", "NVIDIA H200", "bfloat16", 128) == choice
        tried += 1
    assert tried == 96
    assert block_sizes.triton.pick("block_scores", "NVIDIA H200", "bfloat16", 128) == before
