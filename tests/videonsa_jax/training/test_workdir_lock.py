"""A working directory belongs to one run at a time, and never to a dead one."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from videonsa_jax.errors import UserError
from videonsa_jax.training import workdir_lock

HOLDER = """
import pathlib, sys, time
from videonsa_jax.training import workdir_lock
with workdir_lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_told_of_the_first_until_that_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, workdir_lock.held(tmp_path):
            pass
        holder = f"host {socket.gethostname()}, process {first.pid}, since "
        assert str(error.value).startswith(f"{tmp_path} is in use by a run on {holder}")
        first.send_signal(signal.SIGKILL)
    with workdir_lock.held(tmp_path):
        stored = json.loads((tmp_path / workdir_lock.FILE).read_text())
        assert stored["process"] == os.getpid()
    assert (tmp_path / workdir_lock.FILE).read_text() == ""


def test_a_killed_run_of_another_host_is_named_and_does_not_block(tmp_path, capsys):
    details = {"host": "node7", "process": 12, "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / workdir_lock.FILE).write_text(json.dumps(details))
    with workdir_lock.held(tmp_path):
        pass
    assert "last used by a run on host node7, process 12, since 2026" in capsys.readouterr().err


def test_a_file_system_without_locks_is_told_and_does_not_block(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with workdir_lock.held(tmp_path):
        pass
    line = f"{tmp_path} cannot be locked (No locks available); see that no other run uses it\n"
    assert capsys.readouterr().err == line


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"), workdir_lock.held(tmp_path / "file" / "run"):
        pass
