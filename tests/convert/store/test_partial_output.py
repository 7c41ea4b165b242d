"""A folder gets its name only when it is complete."""

import contextlib
import errno
import os

import pytest

from convert.store import partial_output
from videonsa_jax.errors import UserError


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "x"
    with partial_output.new_folder(path) as folder:
        (folder / "file").write_text("1")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["file"]
    assert [file.name for file in path.parent.iterdir()] == ["x"]


def test_a_failed_attempt_stays_marked_and_is_begun_anew(tmp_path):
    path, work = tmp_path / "x", tmp_path / "x.incomplete"
    with contextlib.suppress(KeyboardInterrupt), partial_output.new_folder(path) as folder:
        (folder / "old").touch()
        raise KeyboardInterrupt
    assert not path.exists()
    assert (work / partial_output.MARKER).exists()
    with partial_output.new_folder(path) as folder:
        assert folder == work
        (folder / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert not work.exists()


def test_nothing_of_others_is_touched(tmp_path):
    path, work = tmp_path / "x", tmp_path / "x.incomplete"
    work.mkdir()
    (work / "mine").touch()
    with (
        pytest.raises(UserError, match="was not made by a conversion; remove it"),
        partial_output.new_folder(path),
    ):
        pass
    assert (work / "mine").exists()
    path.symlink_to("nowhere")
    with (
        pytest.raises(UserError, match="x already exists; choose another destination"),
        partial_output.new_folder(path),
    ):
        pass


def test_two_processes_do_not_write_one_folder(tmp_path):
    with (
        partial_output.new_folder(tmp_path / "x"),
        pytest.raises(UserError, match=r"another process is writing .*x\.incomplete"),
        partial_output.new_folder(tmp_path / "x"),
    ):
        pass


def test_a_full_disk_is_one_line(tmp_path):
    message = r"No space left on device \([\d,]+ bytes are free\); .*x\.incomplete is incomplete"
    with (
        pytest.raises(UserError, match=message) as error,
        partial_output.new_folder(tmp_path / "x") as folder,
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "file"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()
