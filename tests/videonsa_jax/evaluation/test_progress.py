"""In a log, progress is plain lines."""

import io

from videonsa_jax.evaluation.progress import Progress


def test_log_gets_whole_lines_with_the_end_of_the_work():
    stream = io.StringIO()
    with Progress("needle", 4, done=1, stream=stream) as progress:
        progress.advance(2)
        progress.advance(1, "accuracy 0.500")
    assert stream.getvalue() == "needle  4/4  ETA 0:00:00  accuracy 0.500\n"
