"""Processes under test: started on their core, watched, ended. Proxies run on core 0, all else on core 1."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

PROXY_CORE: Final = 0
OTHER_CORE: Final = 1
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A part of the bench did not start or did not do what it was asked."""


def pinned(argv: Sequence[str], core: int | None) -> list[str]:
    """*argv*, to run on *core* alone, where there is more than one; None: wherever the kernel likes."""
    if core is None:
        return list(argv)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return list(argv)
    return ["taskset", "-c", str(cores[core]), *argv]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Process:
    """A running server; *pids* are those whose CPU and memory count."""

    name: str
    port: int
    child: subprocess.Popen[bytes]

    @property
    def pids(self) -> list[int]:
        return [self.child.pid, *_children(self.child.pid)]

    def cpu_s(self) -> float:
        """User and system time so far."""
        ticks = 0
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS_PER_S

    def rss_bytes(self) -> int:
        total = 0
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmRSS:"):
                        total += int(line.split()[1]) * 1024
        return total


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *_children(int(child))]
    return found


@contextlib.contextmanager
def serving(
    name: str,
    argv: Sequence[str],
    *,
    port: int,
    core: int | None,
    log: IO[bytes],
    environment: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """Run *argv* until the block ends; it must listen on *port* within 30 s."""
    child = subprocess.Popen(
        pinned(argv, core),
        stdout=log,
        stderr=log,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not _listens(port):
            if child.poll() is not None or time.monotonic() > deadline:
                log.flush()
                raise BenchError(f"{name} did not start: {Path(log.name).read_text()[-2000:]}")
            time.sleep(0.05)
        yield Process(name, port, child)
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def memory_directory() -> Iterator[Path]:
    """A directory in memory: no disk is measured."""
    base = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="sealgate-bench-", dir=base if base.is_dir() else None))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
