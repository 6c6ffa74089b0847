"""A file system of a few hundred kilobytes, to be filled for real."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class SmallDisk:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Leave not a byte."""
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (65_536, 4_096, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def clear(self) -> None:
        self._ballast.unlink()


@contextlib.contextmanager
def small_disk(path: Path, *, size_kib: int) -> Iterator[SmallDisk]:
    """Mounted at *path*, which is made. Skips the test where that is not permitted."""
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k,mode=0700", "none", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
