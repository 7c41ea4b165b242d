"""Several processes of the training program: one run, or one line that says why not."""

import signal

import jax
import numpy as np
import pytest

from tests import training_program
from videonsa_jax.training import checkpoint, metrics, preemption

pytestmark = pytest.mark.slow

STEPS = {"train": {"steps": 6}}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process with one device made."""
    workdir = tmp_path_factory.mktemp("one")
    training_program.complete(workdir, STEPS)
    return workdir


def assert_close(workdir, want):
    """Fails unless two runs have the same losses and made the same parameters, up to rounding."""
    losses = [[row["loss"] for row in metrics.read_rows(folder)] for folder in (workdir, want)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    params = [checkpoint.load_params(folder) for folder in (workdir, want)]
    # A few differ by more: AdamW moves a number whose gradient is near 0 by how that was rounded.
    errors = jax.tree.map(lambda x, y: np.sqrt(np.mean((x - y) ** 2)), *params)
    assert max(jax.tree.leaves(errors)) < 2e-5, errors


def test_two_processes_equal_one(tmp_path, one):
    training_program.complete(tmp_path, STEPS, 2)
    assert_close(tmp_path, one)
    got, want = (checkpoint.load_params(folder) for folder in (tmp_path, one))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)


def test_two_processes_that_share_rows_equal_one(tmp_path, one):
    shared = {"sharding": "fsdp_cp", "mesh": {"fsdp": 1, "context": 2}}
    training_program.complete(tmp_path, STEPS | shared | {"data": {"buckets": [[32, 16]]}}, 2)
    assert_close(tmp_path, one)


def test_four_processes_stop_together_and_two_end_as_one(tmp_path, one):
    # JAX looks for the signal once a second.
    with training_program.start(tmp_path, *[STEPS] * 4, seconds_per_batch=1) as programs:
        training_program.await_rows(tmp_path, 1, programs[0])
        programs[1].send_signal(signal.SIGTERM)
        ended = training_program.outcomes(programs)
    stopped = checkpoint.newest_step(tmp_path)
    line = f"train.py: asked to stop; step {stopped} of 6 is saved in {tmp_path}"
    assert ended == [(preemption.EXIT_CODE, line)] * 4
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == [*range(1, stopped + 1)]
    training_program.complete(tmp_path, STEPS, 2)
    assert [row["step"] for row in metrics.read_rows(tmp_path)] == [*range(1, 7)]
    assert_close(tmp_path, one)


TENSOR = {"sharding": "fsdp_tp", "mesh": {"fsdp": 1, "tensor": 8}}
CONTEXT = {
    "sharding": "fsdp_cp",
    "mesh": {"fsdp": 1, "context": 8},
    "data": {"buckets": [[32, 16]]},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "seeds": (
            ({"seed": 0}, {"seed": 1}),
            "the processes have different configs: seed=0 in process 0, 1 in process 1; start the "
            "same command everywhere",
        ),
        "devices": (
            ({"mesh": {"fsdp": 3}},) * 2,
            "config.mesh: dcn=1 x data=1 x fsdp=3 x tensor=1 x context=1 is 3 devices, but there "
            "are 8; for example --config.mesh.fsdp=8",
        ),
        "heads": (
            (TENSOR,) * 2,
            "text/layers/attn/k/bias: its 'kv_heads' dimension of 2 cannot be split over 8 devices "
            "(tensor); use 2, or --config.sharding.kv_heads=None",
        ),
        "block": (
            (CONTEXT,) * 2,
            "config.data.buckets: 32 vision slots cannot be split in whole blocks of 16 over 8 "
            "devices (context); use 128 slots, or 2 devices",
        ),
        "axis": (
            ({"sharding": {"heads": "tensr"}},) * 2,
            "config.sharding: heads='tensr' names the mesh axis 'tensr', which does not exist; did "
            "you mean 'tensor'?",
        ),
    }.values(),
    ids=["seeds", "devices", "heads", "block", "axis"],
)
def test_what_is_wrong_ends_every_process_with_the_same_line(tmp_path, changes, message):
    with training_program.start(tmp_path, *changes, devices=4) as programs:
        first, second = training_program.outcomes(programs)
    assert first == second
    assert first[0] == 1
    assert first[1].startswith(f"train.py: {message}"), first


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (0, "was not reached within 2 s ([Errno 111] Connection refused); is process 0 running"),
        (1, "was reached by 1 of 2 processes within 2 s, not by 1; start the same command for"),
    ],
)
def test_a_process_that_waits_in_vain_says_for_whom(tmp_path, missing, message):
    changes = STEPS, STEPS
    with training_program.start(
        tmp_path, *changes, connect_timeout_s=2, missing=[missing]
    ) as programs:
        ((code, line),) = training_program.outcomes(programs)
    assert code == 1
    assert f" {message}" in line
