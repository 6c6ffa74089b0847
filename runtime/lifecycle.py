"""Life of a process: hardened at the start, a clean stop on SIGTERM.

1. Key material is in memory only: no core dump, no reading of the memory by other processes of the same user,
   no swap as far as the system lets us. What the system refuses is returned as warnings, for the log and
   `doctor`.
2. SIGTERM and SIGINT ask the main coroutine to end, by an event; a second one cancels it.
3. The loop is uvloop's (event_loop.py). No eager task factory: uvloop 0.23 with one fails on Python < 3.13.3
   (uvloop's pull request 748), which is why mitmproxy's `Master.run()` is not used either.
"""

import asyncio
import ctypes
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog

from runtime.event_loop import EventLoop

log = structlog.get_logger()

# <sys/prctl.h>
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
# <linux/capability.h>
_CAP_IPC_LOCK: Final = 14
# <sys/mman.h>
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4

type Main = Callable[[asyncio.Event], Awaitable[None]]


def harden_process() -> list[str]:
    """Close the ways by which memory leaves the process (rule 1); what could not be closed, as sentences.

    To be called first, before any key is read. exec undoes the part that prctl sets.
    """
    warnings = []
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # not honoured when core_pattern is a pipe ...
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:  # ... this is; it shuts /proc/<pid>/mem as well
        warnings.append(f"core dumps are not ruled out: prctl says {_error_text()}")
    # Locking all of a growing address space fails where memlock is limited, and with MCL_FUTURE every later
    # allocation would fail as well: a half success is worse than none, so the limit is looked at first.
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and not _may_lock_any_amount():
        warnings.append(
            f"memory can be swapped: the memlock limit is {limit} bytes; "
            "set LimitMEMLOCK=infinity or turn swap off"
        )
    elif libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        warnings.append(f"memory can be swapped: mlockall says {_error_text()}; turn swap off")
    return warnings


def raise_open_files() -> int:
    """Let this process open as many files as the machine allows it; returns how many (-1: any number).

    The soft limit is 1,024 mostly, for programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends. ProcessLookupError if it has already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it ended before the line above
        raise ProcessLookupError(f"the parent {parent_pid} has ended")


async def run_until_signalled(main: Main, *, on_hangup: Callable[[], None] | None = None) -> None:
    """Await `main(stop)`; SIGTERM and SIGINT set *stop*, a second one cancels, SIGHUP calls *on_hangup*.

    Whatever *main* raises is raised; a cancellation by the second signal ends quietly.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    task = asyncio.current_task()
    impatient = False

    def ask_to_stop(name: str) -> None:
        nonlocal impatient
        if stop.is_set() and task is not None:
            log.warning("stopping at once", signal=name)
            impatient = True
            task.cancel()
            return
        log.info("stopping", signal=name)
        stop.set()

    handled = [signal.SIGTERM, signal.SIGINT]
    for number in handled:
        loop.add_signal_handler(number, ask_to_stop, number.name)
    if on_hangup is not None:
        handled.append(signal.SIGHUP)
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        await main(stop)
    except asyncio.CancelledError:
        if not impatient:
            raise
        if task is not None:
            task.uncancel()
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def run(main: Main, *, on_hangup: Callable[[], None] | None = None) -> None:
    """Run *main* on a uvloop until it ends or a signal asks it to."""
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(run_until_signalled(main, on_hangup=on_hangup))


def _may_lock_any_amount() -> bool:
    """Whether CAP_IPC_LOCK is effective: root in a container often lacks it."""
    status = Path("/proc/self/status").read_bytes().splitlines()
    effective = next((line.split()[1] for line in status if line.startswith(b"CapEff:")), b"0")
    return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)


def _error_text() -> str:
    return os.strerror(ctypes.get_errno())
