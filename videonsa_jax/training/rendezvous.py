"""The processes of a run meet, before JAX connects them.

JAX ends a process that waits for another one in vain with a stack trace. Here all of them say in
one line which ones are missing.
"""

import contextlib
import socket
import time

from videonsa_jax.errors import UserError

MAGIC = "videonsa_jax"  # tells the processes of a run from others that use the same port
SILENCE = 5  # seconds until a connection that says nothing is given up
SHOWN = 8  # missing processes


def wait_for_peers(address: str, count: int, index: int, connect_timeout_s: float) -> None:
    """Returns when all processes of a run have called it; process 0 leaves its port free.

    Args:
      address: HOST:PORT of process 0.
      count: processes of the run.
      index: which of them this is.
      connect_timeout_s: seconds to wait for process 0, and then for all.

    Raises:
      UserError: the address is none, process 0 was not reached or cannot listen, or, on all that
        came, others did not or count the processes otherwise.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={address} must be HOST:PORT of process 0")
    if index:
        problem = _visit(
            host.strip("[]"), int(port), f"{MAGIC} {index} {count}\n", connect_timeout_s
        )
    else:
        problem = _receive(int(port), count, connect_timeout_s)
    if problem:
        raise UserError(f"--coordinator={address} {problem}")


def _receive(port: int, count: int, connect_timeout_s: float) -> str:
    """Process 0: waits for the others and tells each what is wrong, or nothing."""
    try:
        server = _listen(port, count)
    except (OSError, OverflowError) as error:
        return f"cannot be listened on by process 0 ({error}); choose another port"
    with server, contextlib.ExitStack() as connections:
        peers = {}
        problem = _gather(server, count, connect_timeout_s, peers, connections)
        for peer in peers.values():
            with contextlib.suppress(OSError):  # it waited no longer
                peer.sendall(f"{MAGIC} {problem}\n".encode())
    return problem


def _listen(port: int, backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
        return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _gather(server, count, connect_timeout_s, peers, connections) -> str:
    """Fills `peers`, the connection of each other process; what is wrong, or nothing."""
    deadline = time.monotonic() + connect_timeout_s
    while missing := [str(index) for index in range(1, count) if index not in peers]:
        left = deadline - time.monotonic()
        if left <= 0:
            return (
                f"was reached by {count - len(missing)} of {count} processes within "
                f"{connect_timeout_s:.0f} s, not by {', '.join(missing[:SHOWN])}"
                f"{' ...' if missing[SHOWN:] else ''}; start the same command for each"
            )
        server.settimeout(left)
        # Nobody came, or it said nothing, or something that no process of a run says.
        with contextlib.suppress(OSError, ValueError):
            peer = connections.enter_context(server.accept()[0])
            peer.settimeout(SILENCE)
            greeting, index, theirs = peer.makefile().readline().split()
            if greeting == MAGIC:
                peers[int(index)] = peer
                if int(theirs) != count:
                    return f"has --num_processes={count}, but process {index} has {theirs}"
    return ""


def _visit(host: str, port: int, greeting: str, connect_timeout_s: float) -> str:
    """Another process: goes to process 0, and hears what is wrong, or nothing."""
    deadline = time.monotonic() + connect_timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=SILENCE) as connection:
                connection.sendall(greeting.encode())
                connection.settimeout(connect_timeout_s + SILENCE)
                answer = connection.makefile(errors="replace").readline()
            if answer.startswith(MAGIC):
                return answer.removeprefix(MAGIC).strip()
            reason = "what answers is not process 0 of this run"
        except (OSError, OverflowError) as error:
            reason = error
        if time.monotonic() > deadline:
            return (
                f"was not reached within {connect_timeout_s:.0f} s ({reason}); is process 0 "
                "running, and its port open?"
            )
        time.sleep(min(1, connect_timeout_s / 10))
