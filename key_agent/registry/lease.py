"""Who may write to the registry: a lease with a fencing term, in the registry itself.

1. One row: the holder, its term, how often it has renewed. A term is given once, and each is higher than all
   before it.
2. Every transaction of a holder begins by finding its own term there (`check`). A holder that was frozen,
   paused or cut off, while another took over, finds it gone: nothing of that transaction is kept.
3. No clock is compared with another machine's. Who wants the lease watches the count of renewals for LEASE_S
   on its own boot clock; who holds it counts itself out TRUST_S after it began its last renewal. The first is
   longer, so there is a time at which nobody leads, and none at which two do.
4. On one machine nobody has to wait: there a process that has died, and a renewal that is overdue, can be
   seen. Containers with process tables of their own count as machines of their own.
5. SQLite lets nobody write while a frozen process is inside a transaction, and nobody can end that but the
   administrator; PostgreSQL's session is ended by who takes over (database.py).
"""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy import Connection, insert, select, update

from key_agent.registry.tables import lease

LEASE_S: Final = 10.0
TRUST_S: Final = 8.0
RENEW_S: Final = 2.5
LOOK_S: Final = 1.0
_ROW: Final = 1


@dataclass(frozen=True, slots=True)
class Process:
    """This process, so that others on the machine can tell whether it is alive."""

    machine: str
    """Boot id and process table."""
    pid: int
    started: str
    """In clock ticks after boot: a pid is used again, this is not."""
    host: str
    """For people."""

    @classmethod
    def own(cls) -> Self:
        return cls(_machine(), os.getpid(), _started(os.getpid()) or "", socket.gethostname()[:64])

    def is_gone(self, here: "Process") -> bool:
        """True only if that can be known: same machine, and no such process any more."""
        return self.machine == here.machine and _started(self.pid) != self.started


@cache
def _machine() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}/{Path('/proc/self/ns/pid').readlink()}"


def _started(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat; the command, which may hold anything, ends with the last parenthesis."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]  # a zombie holds nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The row as read."""

    term: int
    instance: str
    """Random, of the process that holds it; empty: nobody does."""
    agent_id: str
    process: Process
    renewals: int
    renewed_boot_s: float
    """On the holder's boot clock: means something on its machine alone."""
    since_ms: int

    @property
    def is_free(self) -> bool:
        return not self.instance

    def describe(self) -> str:
        return f"agent {self.agent_id} on {self.process.host}, process {self.process.pid}, term {self.term}"

    def has_ended(self, here: Process, boot_s: float) -> bool | None:
        """Whether its holder is out of time or dead; None if only watching it can tell."""
        if self.is_free or self.process.is_gone(here):
            return True
        if self.process.machine == here.machine:
            return boot_s - self.renewed_boot_s >= LEASE_S
        return None


class Watch:
    """Looks at another's lease, again and again, until it has ended or is seen to live."""

    def __init__(self, here: Process) -> None:
        self._here = here
        self._seen: tuple[int, int] | None = None
        self._since_boot_s = 0.0
        self.is_alive = False
        """It was renewed while we watched: its holder works."""

    def may_take(self, holding: Holding | None, boot_s: float) -> bool:
        if holding is None:
            return True
        ended = holding.has_ended(self._here, boot_s)
        if ended is not None:
            self.is_alive = not ended
            return ended
        seen = (holding.term, holding.renewals)
        if seen != self._seen:
            self.is_alive = self._seen is not None
            self._seen, self._since_boot_s = seen, boot_s
        return boot_s - self._since_boot_s >= LEASE_S


def read(c: Connection) -> Holding | None:
    row = c.execute(select(lease).where(lease.c.id == _ROW)).first()
    if row is None:
        return None
    return Holding(
        term=row.term,
        instance=row.instance,
        agent_id=row.agent_id,
        process=Process(row.machine, row.pid, row.started, row.host),
        renewals=row.renewals,
        renewed_boot_s=row.renewed_boot_s,
        since_ms=row.since_ms,
    )


def take(
    c: Connection,
    seen: Holding | None,
    *,
    instance: str,
    agent_id: str,
    here: Process,
    boot_s: float,
    now_ms: int,
) -> int | None:
    """The new term, or None if the lease is no longer as *seen*: somebody was quicker."""
    values: dict[str, Any] = {
        "term": 1 if seen is None else seen.term + 1,
        "instance": instance,
        "agent_id": agent_id,
        "machine": here.machine,
        "pid": here.pid,
        "started": here.started,
        "host": here.host,
        "renewals": 0,
        "renewed_boot_s": boot_s,
        "since_ms": now_ms,
    }
    if seen is None:
        c.execute(insert(lease).values(id=_ROW, **values))
        return 1
    done = c.execute(
        update(lease)
        .where(
            lease.c.id == _ROW,
            lease.c.term == seen.term,
            lease.c.instance == seen.instance,
            lease.c.renewals == seen.renewals,
        )
        .values(**values)
    )
    return int(values["term"]) if done.rowcount == 1 else None


def renew(c: Connection, *, instance: str, term: int, boot_s: float) -> bool:
    """False: it is another's."""
    done = c.execute(
        update(lease)
        .where(lease.c.id == _ROW, lease.c.term == term, lease.c.instance == instance)
        .values(renewals=lease.c.renewals + 1, renewed_boot_s=boot_s)
    )
    return bool(done.rowcount == 1)


def release(c: Connection, *, instance: str, term: int) -> None:
    """The next one need not wait. No-op if it is another's."""
    c.execute(
        update(lease)
        .where(lease.c.id == _ROW, lease.c.term == term, lease.c.instance == instance)
        .values(instance="")
    )


def check(c: Connection, *, instance: str, term: int) -> bool:
    """Whether it is still this one's; it stays so until the transaction has ended (rule 2)."""
    # PostgreSQL: who takes over waits for us, or we see that it has. SQLite: one writer at a time anyway.
    query = select(lease.c.term, lease.c.instance).where(lease.c.id == _ROW).with_for_update(read=True)
    row = c.execute(query).first()
    return row is not None and (row.term, row.instance) == (term, instance)
