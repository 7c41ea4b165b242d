"""Runs public kernels in processes of another Python on the same card."""

import json
import pathlib
import subprocess
import tempfile

BASELINES = ("torch", "fla", "xunhaolai", "mdy666")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(python: str | None, tokens: str, seed: int) -> dict | None:
    """{"rows": as those of the benchmark, "skipped": {baseline: why}}; None without a Python.

    Each baseline has a process of its own, so that one that crashes or is not installed costs
    nothing but itself.

    Args:
      python: of an environment with PyTorch and public kernels, or None.
      tokens: lengths, by comma.
      seed: of the inputs.
    """
    if python is None:
        return None
    rows, skipped = [], {}
    for baseline in BASELINES:
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder, "rows.json")
            command = [
                python,
                "-m",
                "benchmarks.timing.baselines",
                f"--baseline={baseline}",
                f"--tokens={tokens}",
            ]
            command += [f"--seed={seed}", f"--out={out}"]
            done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                skipped[baseline] = lines[-1]
                print(f"{baseline}: skipped, {lines[-1]}", flush=True)
            else:
                rows += json.loads(out.read_text())
    return {"rows": rows, "skipped": skipped}
