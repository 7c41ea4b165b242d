"""Times programs in turns."""

import time

import jax

SAMPLE = 0.02  # seconds that one timing of a GPU lasts at least, as one queue of calls
MOST_CALLS = 100


def seconds(run, arrays, calls=1):
    """Seconds per call of `calls` calls that are queued together."""
    begin = time.perf_counter()
    for _ in range(calls):
        out = run(*arrays)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls


def calls_per_sample(run, arrays):
    """How many calls of a GPU program one timing takes; also warms it up."""
    once = min(seconds(run, arrays) for _ in range(3))
    return min(max(round(SAMPLE / once), 1), MOST_CALLS)


def interleaved(programs, rounds):
    """Milliseconds of each run of each program.

    Everything takes turns, lengths too: a slow minute of the machine then touches all alike, and
    ratios and growth factors can be trusted more than the times themselves.
    """
    times = [[] for _ in programs]
    begin = time.perf_counter()
    for turn in range(rounds):
        for program, samples in zip(programs, times, strict=True):
            samples.append(1e3 * seconds(program.run, program.arrays, program.calls))
        spent = time.perf_counter() - begin
        left = spent / (turn + 1) * (rounds - turn - 1)
        print(f"round {turn + 1} of {rounds}: {spent:.0f} s, {left:.0f} s left", flush=True)
    return times
