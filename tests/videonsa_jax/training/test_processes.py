"""Processes find each other, or say in one line why not."""

import dataclasses

import jax
import pytest

from tests import synthetic
from videonsa_jax.errors import UserError
from videonsa_jax.training import processes, rendezvous


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
        processes.join(*settings, connect_timeout_s=0)


def test_jax_connects_those_that_met(monkeypatch):
    met, joined = [], []
    monkeypatch.setattr(rendezvous, "wait_for_peers", lambda *args: met.append(args))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: joined.append(args))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    processes.join("host:8", None, 1, connect_timeout_s=10)
    assert met == [("host:8", 2, 1, 10)]
    assert joined == [("host:8", 2, 1)]


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=first must be a number"):
        processes.join("host:8", 2, None)


def test_no_cluster_to_ask_is_one_line(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    message = r"--coordinator=auto: JAX knows no cluster here \(.*\); give --coordinator=HOST:PORT"
    with pytest.raises(UserError, match=message):
        processes.join("auto", None, None)


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
