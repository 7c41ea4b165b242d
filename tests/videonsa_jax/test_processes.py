"""Processes find each other, or say in one line why not."""

import dataclasses
import socket
import threading

import jax
import pytest

from tests import synthetic
from videonsa_jax import processes
from videonsa_jax.errors import UserError


def test_one_process_joins_nothing():
    processes.join(None, None, None)
    assert jax.process_count() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("localhost:1234", 2, None), "--process_id is missing"),
        (("localhost:1234", 2, 2), r"--process_id=2 must be in 0..1: --num_processes=2"),
        (("localhost", 2, 1), "--coordinator=localhost must be HOST:PORT of process 0"),
        (("nowhere.invalid:1", 2, 1), "--coordinator=nowhere.invalid:1 was not reached within 0 s"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        processes.join(*settings, patience=0)


def test_a_coordinator_that_starts_late_is_waited_for(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: joined.append(args))
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    late = threading.Timer(0.3, lambda: servers.append(socket.create_server(("localhost", port))))
    servers = []
    late.start()
    processes.join(f"localhost:{port}", 2, 1, patience=10)
    late.join()
    servers[0].close()
    assert joined == [(f"localhost:{port}", 2, 1)]


def test_processes_with_different_configs_say_where(monkeypatch):
    cfg = synthetic.run_config()
    processes.check_same_config(cfg)
    other = dataclasses.replace(cfg, seed=3)
    gathered = []
    monkeypatch.setattr(processes, "gather", lambda value: gathered.append(value) or gathered)
    processes.check_same_config(cfg)
    message = "different configs: seed=0 in process 0, 3 in process 1; start the same command"
    with pytest.raises(UserError, match=message):
        processes.check_same_config(other)
