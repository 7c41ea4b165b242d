"""What is said of a bad sample: one short line, whatever its name and the reason hold."""

import os

import pytest

from videonsa_jax.data import video
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.images import read_image

READ = (read_image, video.probe)


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\u2028b.mp4", os.fsdecode(b"a\xff.mp4")])
def test_any_name_and_reason_are_one_printable_line(name):
    line = str(BadSample(name, "first\r\nsecond \ud800"))
    assert line.isprintable()
    assert line.endswith("b.mp4: first second \\ud800") or "\\udcff.mp4: first" in line


def test_a_reason_of_any_length_is_cut():
    assert len(str(BadSample("a.mp4", f"KeyError: {list(range(100_000))}"))) < 600


@pytest.mark.parametrize("read", READ)
def test_what_is_no_file_is_not_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(BadSample, match="is no file, but a folder or a device"):
            read(path)


@pytest.mark.parametrize("read", READ)
def test_an_empty_file_is_said_to_be(tmp_path, read):
    (tmp_path / "a").touch()
    with pytest.raises(BadSample, match="is an empty file of 0 bytes"):
        read(tmp_path / "a")
