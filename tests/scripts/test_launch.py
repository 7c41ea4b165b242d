"""The launcher starts a command everywhere, and ends it everywhere."""

import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def launch(*args, hosts="local,local", **settings):
    command = [sys.executable, "scripts/launch.py", f"--hosts={hosts}", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **settings)


def test_every_process_knows_its_number_and_the_coordinator():
    program = (
        "import os; print(*(os.environ[f'JAX_{name}'] for name in "
        "('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID')))"
    )
    out, errors = launch("--port=77", "--", sys.executable, "-c", program).communicate()
    assert sorted(out.splitlines()) == ["[0] localhost:77 2 0", "[1] localhost:77 2 1"], errors


def test_one_failure_ends_all():
    program = (
        "import os, sys, time; number = int(os.environ['JAX_PROCESS_ID']); "
        "sys.exit(7) if number else time.sleep(600)"
    )
    done = launch("--", sys.executable, "-c", program)
    done.communicate(timeout=60)
    assert done.returncode == 7


def test_a_stop_reaches_every_process():
    program = "import time; print('up', flush=True); time.sleep(600)"
    done = launch("--", sys.executable, "-c", program)
    assert {done.stdout.readline() for _ in range(2)} == {"[0] up\n", "[1] up\n"}
    done.send_signal(signal.SIGTERM)
    done.communicate(timeout=60)
    assert done.returncode != 0


def test_a_host_that_cannot_be_reached_is_an_error():
    done = launch("--", "true", hosts="nowhere.invalid")
    out, _ = done.communicate(timeout=60)
    assert done.returncode != 0
    assert out.startswith("[0] ")
