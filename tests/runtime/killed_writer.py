"""A process that writes an audit log, killed at some moment."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from runtime.audit import AuditLog
from tests.fakes.clock import ManualClock

ROOT = Path(__file__).parents[2]


def killed_while_it_writes(program: str, path: Path, clock: ManualClock, *, lines: int) -> None:
    """*program* writes to the log at its first argument and prints each number once it is acknowledged.

    It is killed after *lines* of them; all that it acknowledged has to be there.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    for _ in range(lines):
        acknowledged = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    acknowledged = int(([str(acknowledged), *child.stdout.read().split("\n")[:-1]])[-1])
    child.wait()
    child.stdout.close()
    log = AuditLog.open(path, clock)
    assert log.head.seq >= acknowledged
    log.close()
