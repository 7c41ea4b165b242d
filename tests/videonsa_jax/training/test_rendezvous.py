"""Processes meet, or all that came say which did not."""

import concurrent.futures
import contextlib
import socket
import threading
import time

import pytest

from videonsa_jax.errors import UserError
from videonsa_jax.training import rendezvous


@pytest.fixture
def port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def wait_for_peers(port, *processes, connect_timeout_s):
    """What each of the (index, count) hears; None if they met."""

    def one(process):
        index, count = process
        try:
            rendezvous.wait_for_peers(f"localhost:{port}", count, index, connect_timeout_s)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(one, processes))


def test_all_meet_and_leave_the_port_free(port):
    for _ in range(2):
        assert wait_for_peers(port, (1, 3), (2, 3), (0, 3), connect_timeout_s=60) == [None] * 3
    socket.create_server(("localhost", port)).close()


def test_process_0_may_come_last(port):
    others = []
    early = threading.Thread(
        target=lambda: others.extend(wait_for_peers(port, (1, 2), connect_timeout_s=60))
    )
    early.start()
    early.join(0.3)
    assert wait_for_peers(port, (0, 2), connect_timeout_s=60) == [None]
    early.join()
    assert others == [None]


def test_all_that_came_hear_who_is_missing(port):
    line = (
        f"--coordinator=localhost:{port} was reached by 2 of 4 processes within 2 s, not by 2, 3; "
        "start the same command for each"
    )
    assert wait_for_peers(port, (0, 4), (1, 4), connect_timeout_s=2) == [line] * 2


def test_without_process_0_nobody_waits_longer(port):
    (line,) = wait_for_peers(port, (1, 2), connect_timeout_s=0)
    assert line.startswith(f"--coordinator=localhost:{port} was not reached within 0 s (")


def test_processes_that_count_differently_hear_it(port):
    line = f"--coordinator=localhost:{port} has --num_processes=2, but process 1 has 3"
    assert wait_for_peers(port, (0, 2), (1, 3), connect_timeout_s=60) == [line] * 2


def connect(port):
    """To a program that may not listen yet."""
    for _ in range(600):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("localhost", port), timeout=60)
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on port {port}")


def test_strangers_are_no_processes(port):
    heard = []
    leader = threading.Thread(
        target=lambda: heard.extend(wait_for_peers(port, (0, 2), connect_timeout_s=60))
    )
    leader.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\xff\n", b"a 1 2\n"):
        with connect(port) as stranger:
            stranger.sendall(words)
    assert wait_for_peers(port, (1, 2), connect_timeout_s=60) == [None]
    leader.join()
    assert heard == [None]


def test_another_program_on_the_port_is_named():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            connection.close()

        other = threading.Thread(target=answer)
        other.start()
        (line,) = wait_for_peers(port, (1, 2), connect_timeout_s=0)
        other.join()
    assert "what answers is not process 0 of this run" in line


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (line,) = wait_for_peers(port, (0, 2), connect_timeout_s=0)
    assert "cannot be listened on by process 0 (" in line
    assert "; choose another port" in line


@pytest.mark.parametrize("address", ["localhost", ":1", "localhost:http", "localhost:99999"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_wrong_address_is_named(address, index):
    with pytest.raises(UserError, match=f"--coordinator={address} ") as error:
        rendezvous.wait_for_peers(address, 2, index, 0)
    assert "\n" not in str(error.value)
