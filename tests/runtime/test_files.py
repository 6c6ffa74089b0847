"""A file is replaced whole or not at all. (That it survives a power cut, no test here can show.)"""

import os
import stat
from pathlib import Path

import pytest

from runtime.files import replace_file, sync_directory, write_new_file


def test_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "note"
    replace_file(path, b"one")
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("rb") as reader:
        replace_file(path, b"another, longer")
        assert reader.read() == b"one", "who has it open goes on with the old one"
    assert path.read_bytes() == b"another, longer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]


def test_left_over_by_a_crash(tmp_path: Path) -> None:
    (tmp_path / ".note.new").write_bytes(b"half of what was to be written then, and more")
    replace_file(tmp_path / "note", b"whole")
    assert (tmp_path / "note").read_bytes() == b"whole"


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "note"
    replace_file(path, b"old")
    (tmp_path / ".note.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    sync_directory(tmp_path)
    open_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - of this process
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        sync_directory(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        sync_directory(tmp_path / "missing")
    assert len(os.listdir("/proc/self/fd")) == open_before  # noqa: PTH208


def test_a_new_file_is_whole_private_and_never_overwritten(tmp_path: Path) -> None:
    write_new_file(tmp_path / "new", b"one")
    assert (tmp_path / "new").read_bytes() == b"one"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_new_file(tmp_path / "new", b"two")
    assert (tmp_path / "new").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["new"], "nothing is left behind"
    with pytest.raises(FileNotFoundError):
        write_new_file(tmp_path / "missing" / "new", b"one")
