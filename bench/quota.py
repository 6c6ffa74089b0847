"""A bound on the CPU time of single processes, by the kernel's control groups.

1. Where there are fewer cores than processes to compare, each process is given the same part of a core, in a
   group of its own: what two can do beside one is then a property of the processes, not of the machine.
2. Version 2 (`cpu.max`) where the root offers the `cpu` controller, else version 1 (`cpu.cfs_quota_us`).
   Neither writable (a container, no root): BenchError, never a figure without the bound.
3. The period is short, so that a process at its bound pauses for milliseconds.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from bench.machine import BenchError

PERIOD_US: Final = 10_000
_ROOT: Final = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(pids: Sequence[int], share: float) -> Iterator[None]:
    """Give *pids*, with all their threads, *share* of one core at most, together, until the block ends.

    Processes that they start meanwhile share that with them. BenchError: this machine gives us no groups.
    """
    group, root = _make_group(f"sealgate-bench-{os.getpid()}-{pids[0]}", round(share * PERIOD_US))
    try:
        for pid in pids:
            _write(group / "cgroup.procs", str(pid))
        yield
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # It may have ended just now.
                (root / "cgroup.procs").write_text(left)
        group.rmdir()


def _make_group(name: str, quota_us: int) -> tuple[Path, Path]:
    """The new group, and the one that it was made in."""
    controllers = _ROOT / "cgroup.controllers"
    if controllers.exists() and "cpu" in controllers.read_text().split():
        _write(_ROOT / "cgroup.subtree_control", "+cpu")
        settings = [("cpu.max", f"{quota_us} {PERIOD_US}")]
        root = _ROOT
    elif (_ROOT / "cpu" / "cpu.cfs_quota_us").exists() or (_ROOT / "cpu" / "cpu.shares").exists():
        settings = [("cpu.cfs_period_us", str(PERIOD_US)), ("cpu.cfs_quota_us", str(quota_us))]
        root = _ROOT / "cpu"
    else:
        raise BenchError(f"no cpu control group under {_ROOT}: run as root on a machine that has them")
    group = root / name
    try:
        group.mkdir()
    except OSError as error:
        raise BenchError(f"{group}: {error.strerror}: CPU quotas need root and writable groups") from None
    for file, value in settings:
        try:
            _write(group / file, value)
        except BenchError:
            group.rmdir()
            raise
    return group, root


def _write(file: Path, value: str) -> None:
    try:
        file.write_text(value)
    except OSError as error:
        raise BenchError(f"{file}: {error.strerror}: CPU quotas need root and writable groups") from None
