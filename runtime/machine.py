"""What `doctor` looks at on the machine itself, for both programs: clock, core dumps, swap, disk, audit log.

1. Checks only look. What cannot be found out is a warning, not a failure.
"""

import ctypes
import os
import resource
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from envelope.audit import BrokenChainError
from runtime.audit import mend_broken
from runtime.audit_files import read_chain
from runtime.doctor import Check, failed, ok, warning

MIN_FREE_BYTES: Final = 256 << 20
_STA_UNSYNC: Final = 0x40  # <sys/timex.h>: the kernel's clock is not disciplined by anyone
_CORE_PATTERN: Final = Path("/proc/sys/kernel/core_pattern")
_SWAPS: Final = Path("/proc/swaps")


class _Timex(ctypes.Structure):
    # Only `modes` (0: read) and `status` matter; the rest keeps the kernel's size (<sys/timex.h>).
    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def check_clock() -> Iterator[Check]:
    """Whether the kernel's clock is disciplined."""
    timex = _Timex()
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    except (OSError, AttributeError):
        state = -1
    mend = "run an NTP client: envelopes from more than 30 s ahead or behind their end are refused"
    if state < 0:
        yield warning("clock", "the kernel does not say whether it is synchronised", mend)
    elif timex.status & _STA_UNSYNC:
        yield warning(
            "clock", f"not synchronised; it says {datetime.now(UTC).isoformat(timespec='seconds')}", mend
        )
    else:
        yield ok("clock", "synchronised")


def check_cores(pattern_file: Path = _CORE_PATTERN) -> Iterator[Check]:
    """Where a crash would leave memory, and that ours leaves none: `harden_process` has been called."""
    try:
        pattern = pattern_file.read_text().strip()
    except OSError as error:
        yield warning("core dumps", f"{pattern_file}: {error.strerror}", "look at core_pattern by hand")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    where = "a program" if pattern.startswith("|") else "files"
    if (soft, hard) == (0, 0):
        yield ok("core dumps", f"none of this program; core_pattern names {where}: {pattern}")
    else:
        yield warning(
            "core dumps",
            f"allowed up to {soft} bytes; core_pattern: {pattern}",
            "set LimitCORE=0, and kernel.core_pattern to nothing that keeps dumps",
        )


def check_swap(swaps_file: Path = _SWAPS) -> Iterator[Check]:
    """Swap that is on is no fault where memory is locked; where it is not, keys may be written to it."""
    try:
        areas = [line.split()[0] for line in swaps_file.read_text().splitlines()[1:]]
    except OSError as error:
        yield warning("swap", f"{swaps_file}: {error.strerror}", "look whether swap is on by hand")
        return
    if not areas:
        yield ok("swap", "off")
        return
    yield warning(
        "swap",
        f"on: {', '.join(areas)}",
        "start it by the systemd unit in deploy/ (MemorySwapMax=0, LimitMEMLOCK=infinity), or turn swap off",
    )


def check_disk(name: str, path: Path) -> Iterator[Check]:
    """Room for registry and audit log below *path*: a full disk refuses everything but withdrawals."""
    try:
        space = os.statvfs(path)
    except OSError as error:
        yield failed(name, f"{path}: {error.strerror}", f"make {path}")
        return
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < MIN_FREE_BYTES:
        yield warning(name, f"{free_bytes >> 20} MiB are free at {path}", "free the disk, or move it")
    else:
        yield ok(name, f"{free_bytes >> 20} MiB are free at {path}")


def check_audit(path: Path) -> Iterator[Check]:
    """Whether the chain of the log at *path* holds; also beside the process that writes it."""
    try:
        with path.open("rb") as stream:
            chain = read_chain(stream)
    except FileNotFoundError:
        yield ok("audit log", f"{path}: not there yet")
    except OSError as error:
        yield failed("audit log", f"{path}: {error.strerror}", f"let this user read {path}")
    except BrokenChainError as error:
        yield failed("audit log", f"{path} is broken at {error}", mend_broken(path))
    else:
        yield ok("audit log", f"{chain.head.seq} events, chain holds")
