"""Files are opened as in this process, and what they do to a decoder costs one of them."""

import dataclasses
import os
import pathlib
import pickle
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests import bad_decoders
from tests.bad_decoders import BadDecoder
from videonsa_jax.config.schema import DataConfig
from videonsa_jax.data import processor
from videonsa_jax.data.decoder_pool import DecoderPool
from videonsa_jax.data.errors import BadSample, about_sample
from videonsa_jax.data.sampling import SamplingRule
from videonsa_jax.data.visuals import VideoFile
from videonsa_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
RULE = SamplingRule(fps=8.0, min_frames=2, max_frames=16)
LONG = 60.0  # seconds, so that nothing is lost


@dataclasses.dataclass(frozen=True)
class Process:
    """Tells of the process that looks at it."""

    name: str = "process"
    is_video = True

    def outline(self, rule):
        return os.getpid(), "jax" in sys.modules


@pytest.fixture(scope="module")
def pool():
    with DecoderPool(2, LONG) as pool:
        yield pool


def has_ended(pid: int, seconds: float) -> bool:
    """Waits for a process that may not be a child of this one."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([process], [], [], seconds)
    os.close(process)
    return bool(ended)


def test_it_reads_what_this_process_reads(pool, model, make_video, tmp_path):
    video = VideoFile(str(make_video(tmp_path / "a.mp4")))
    assert pool.outline(video, RULE) == video.outline(RULE)
    got, want = (r(RULE, shrink) for r in (_reader(pool, video), video.read))
    for field in dataclasses.fields(want):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name))
    assert got.images.flags.writeable


def _reader(pool, video):
    return lambda rule, transform: pool.read(video, rule, transform)


def shrink(image, frames):
    del frames
    return processor.resize(image, (28, 28))


def test_decoder_processes_do_not_import_jax(pool):
    pid, has_jax = pool.outline(Process(), RULE)
    assert pid != os.getpid()
    assert not has_jax


def test_threads_share_so_many_processes(pool):
    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(lambda _: pool.outline(Process(), RULE), range(50))
    assert len({pid for pid, _ in answers}) <= 2


def test_without_a_limit_files_are_opened_here():
    assert DecoderPool(2, 0).outline(Process(), RULE)[0] == os.getpid()


@pytest.mark.parametrize("here", [True, False], ids=["here", "elsewhere"])
@pytest.mark.parametrize("fault", bad_decoders.ERRORS)
def test_any_exception_is_a_bad_sample_with_its_type(pool, tmp_path, fault, here):
    error = bad_decoders.ERRORS[fault]
    video = BadDecoder(str(tmp_path / f"read-{fault}.mp4"))
    with pytest.raises(BadSample) as bad:
        (DecoderPool() if here else pool).read(video, RULE, shrink)
    assert bad.value.file == video.name
    assert bad.value.reason == f"{type(error).__name__}: {error}"
    assert bad.value.lost_in is None


@pytest.mark.parametrize(
    ("fault", "timeout_s", "reason"),
    [
        ("hang", 3.0, "took longer than data.decode_timeout_s=3"),
        ("abort", LONG, "was killed (SIGABRT)"),
        ("exit", LONG, "ended with exit code 3"),
    ],
)
def test_lost_decoder_is_replaced_and_the_file_not_tried_again(tmp_path, fault, timeout_s, reason):
    video = BadDecoder(str(tmp_path / f"read-{fault}.mp4"))
    with DecoderPool(1, timeout_s) as pool:
        for _ in range(2):
            with pytest.raises(BadSample) as bad:
                pool.read(video, RULE, shrink)
            assert reason in bad.value.reason
            assert bad.value.lost_in == "read"
        assert bad_decoders.tries(video.name) == ["read"]
        pool.outline(Process(), RULE)
        pool.outline(video, RULE)
    assert bad_decoders.tries(video.name) == ["read", "outline"]


def test_copy_of_a_pool_knows_what_it_knew_and_starts_its_own_processes(pool, tmp_path):
    video = BadDecoder(str(tmp_path / "outline-exit.mp4"))
    with pytest.raises(BadSample):
        pool.outline(video, RULE)
    with pickle.loads(pickle.dumps(pool)) as copy:
        with pytest.raises(BadSample, match="exit code 3"):
            copy.outline(video, RULE)
        assert copy.outline(Process(), RULE) != pool.outline(Process(), RULE)
    assert bad_decoders.tries(video.name) == ["outline"]


def test_process_that_was_killed_between_two_files_is_nobodys_fault(pool):
    pid, _ = pool.outline(Process(), RULE)
    os.kill(pid, signal.SIGKILL)
    assert has_ended(pid, LONG)
    assert pool.outline(Process(), RULE)[0] != pid


def test_notices_to_all_processes_of_a_run_do_not_end_decoders(pool):
    pid, _ = pool.outline(Process(), RULE)
    for notice in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, notice)
    assert pool.outline(Process(), RULE)[0] == pid


def test_closing_ends_a_decoder_at_work_and_blames_no_file(tmp_path):
    pipe = tmp_path / "outline-hang.tries"
    os.mkfifo(pipe)  # opened by the decoder when it has begun
    pool = DecoderPool(1, LONG)
    bad = []

    def open_file():
        try:
            pool.outline(BadDecoder(str(tmp_path / "outline-hang.mp4")), RULE)
        except BadSample as error:
            bad.append(error)

    thread = threading.Thread(target=open_file)
    thread.start()
    pipe.read_text()
    pool.close()
    thread.join()
    assert [(error.reason, error.lost_in) for error in bad] == [
        ("was not opened: the run ended", None)
    ]


def test_decoder_at_work_ends_with_a_killed_parent(tmp_path):
    os.mkfifo(tmp_path / "pids")
    code = (
        "from tests.videonsa_jax.data import test_decoder_pool as t\n"
        f"t.DecoderPool(1, 600.0).outline(t.Hang({str(tmp_path / 'pids')!r}), t.RULE)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    pid = int((tmp_path / "pids").read_text())
    parent.kill()
    parent.wait()
    assert has_ended(pid, LONG)


@dataclasses.dataclass(frozen=True)
class Hang:
    """Writes its process's id to a pipe, then hangs."""

    name: str
    is_video = True

    def outline(self, rule):
        pathlib.Path(self.name).write_text(str(os.getpid()))
        signal.pause()


def test_decoder_that_does_not_start_is_the_runs_fault(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"no decoder process starts .*: ended with exit code 1"):
        DecoderPool(1, LONG).outline(Process(), RULE)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_limit_must_be_some_time(seconds):
    with pytest.raises(ValueError, match=r"data.decode_timeout_s=.* must be in 0..1e6"):
        DataConfig(source=("-",), tokenizer="-", decode_timeout_s=seconds)


@pytest.mark.parametrize("error", [UserError("a setting"), KeyboardInterrupt(), SystemExit(1)])
def test_what_is_not_about_a_sample_passes(error):
    with pytest.raises(type(error)), about_sample("a.mp4"):
        raise error
