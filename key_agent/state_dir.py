"""The agent's directory: 0700, on a local disk, with one process at work in it.

1. Who holds the lock may open registry, audit log and HSM: memory and registry of two would diverge.
2. The kernel lets the lock go when its holder dies, however it dies.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from key_agent.errors import KeyAgentError

LOCK_NAME: Final = "lock"
SOCKET_NAME: Final = "control.sock"
AUDIT_NAME: Final = "audit.jsonl"
REFUSED_PIN_NAME: Final = "refused-pin.json"


class StateLockedError(KeyAgentError):
    """Another process works in this `state_dir`."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(f"{state_dir} is in use by another key-agent process")
        self.next_step = "wait for it to end, or stop it"


class StateDirError(KeyAgentError):
    """`state_dir` is missing or open to others."""

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(cause)
        self.next_step = next_step


@contextmanager
def state_lock(state_dir: Path) -> Iterator[None]:
    """Alone in *state_dir*.

    StateLockedError if somebody else is there; StateDirError if it is no place to work in.
    """
    check_state_dir(state_dir)
    descriptor = os.open(state_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateLockedError(state_dir) from None
        yield
    finally:
        os.close(descriptor)


def check_state_dir(state_dir: Path) -> None:
    try:
        status = state_dir.stat()
    except OSError as error:
        raise StateDirError(f"{state_dir}: {error.strerror}", "`key-agent init` makes it") from None
    if not stat.S_ISDIR(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
        raise StateDirError(f"{state_dir} is open to others, or no directory", f"chmod 700 {state_dir}")
    if status.st_uid != os.geteuid():
        raise StateDirError(
            f"{state_dir} belongs to user {status.st_uid}, this is user {os.geteuid()}",
            "run the command as the agent's user",
        )
