"""In a log, progress is plain lines."""

import io

from videonsa_jax.progress import Progress


def test_log_gets_whole_lines_with_the_end_of_the_work():
    stream = io.StringIO()
    with Progress("needle", 4, done=1, stream=stream) as progress:
        progress.advance(2)
        progress.advance(1, "accuracy 0.500")
    assert stream.getvalue() == "needle  4/4  ETA 0:00:00  accuracy 0.500\n"


def test_bytes_are_told_in_their_prefixes():
    stream = io.StringIO()
    with Progress("from-hf", 1_090_000_000, unit="bytes", stream=stream) as progress:
        progress.advance(1_090_000_000)
    assert stream.getvalue() == "from-hf  1.09GB/1.09GB  ETA 0:00:00\n"
