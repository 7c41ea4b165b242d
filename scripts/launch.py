"""Starts the same command on several hosts, as one run.

    python scripts/launch.py --hosts=node0,node1 [--port=8476] [--cwd=DIR] -- \
        python train.py --config=configs/X.py --workdir=/shared/run

Each host gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which `train.py`
reads; the first host is the coordinator. Hosts are reached by ssh without a password; `local` is
this machine, as often as it is named. Output lines bear the number of their host. When one fails,
the others are asked to stop; the exit code is that of the first that failed.

Not needed where the cluster starts the processes itself: under Slurm or Open MPI (`srun python
train.py --coordinator=auto ...`) and on Cloud TPU (`gcloud compute tpus tpu-vm ssh NAME
--worker=all --command=...`). Uses the standard library only.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading

LOCAL = "local"


def start(host: str, command: list[str], settings: dict[str, str], cwd: str) -> subprocess.Popen:
    """The command on one host, its output in a pipe."""
    if host == LOCAL:
        where = {"cwd": cwd, "env": os.environ | settings}
    else:
        variables = [f"{name}={value}" for name, value in settings.items()]
        line = f"cd {shlex.quote(cwd)} && exec {shlex.join(['env', *variables, *command])}"
        # -tt: the command gets the hang-up when this ssh is ended.
        command, where = ["ssh", "-tt", "-o", "BatchMode=yes", host, line], {}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **where,
    )


def follow(number: int, program: subprocess.Popen) -> None:
    """Prints a program's output until it ends."""
    for line in program.stdout:
        print(f"[{number}] {line}", end="", flush=True)
    program.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", required=True, help="names for ssh, by comma; the first leads")
    parser.add_argument("--port", type=int, default=8476, help="of the coordinator")
    parser.add_argument("--cwd", default=os.getcwd(), help="folder of the command on every host")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    args = parser.parse_args()

    hosts = args.hosts.split(",")
    leader = "localhost" if hosts[0] == LOCAL else hosts[0].rpartition("@")[2]
    programs = [
        start(
            host,
            args.command,
            {
                "JAX_COORDINATOR_ADDRESS": f"{leader}:{args.port}",
                "JAX_NUM_PROCESSES": str(len(hosts)),
                "JAX_PROCESS_ID": str(number),
            },
            args.cwd,
        )
        for number, host in enumerate(hosts)
    ]
    return wait(programs)


def wait(programs: list[subprocess.Popen]) -> int:
    """The exit code of the first program that fails, after which the others are ended; or 0."""
    failed = []
    ended = threading.Lock()

    def stop(*_):
        for program in programs:
            if program.poll() is None:
                program.send_signal(signal.SIGTERM)

    def run(number, program):
        follow(number, program)
        if program.returncode:
            with ended:
                failed.append(program.returncode)
            stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    threads = [threading.Thread(target=run, args=x) for x in enumerate(programs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    code = failed[0] if failed else 0
    return code if code >= 0 else 128 - code  # as a shell says it of a signal


if __name__ == "__main__":
    sys.exit(main())
