"""Errors of the file system that a user can mend are one line."""

import errno
import os

import pytest

from videonsa_jax.errors import UserError, file_errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_with_the_room_that_is_left(tmp_path, code):
    line = rf"^{tmp_path}: {os.strerror(code)} \([\d,]+ bytes are free\); try again$"
    with pytest.raises(UserError, match=line), file_errors(tmp_path, lambda: "try again"):
        raise OSError(code, os.strerror(code))


def test_the_file_of_an_error_is_named(tmp_path):
    line = rf"^{tmp_path}/no: No such file or directory; try again$"
    with pytest.raises(UserError, match=line), file_errors(tmp_path, lambda: "try again"):
        (tmp_path / "no").open()


def test_what_does_not_come_from_the_operating_system_stays(tmp_path):
    with pytest.raises(OSError, match="a library's"), file_errors(tmp_path, lambda: "try again"):
        raise OSError("a library's")
