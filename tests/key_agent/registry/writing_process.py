"""A writer that is going to be killed, or whose power is going to be cut: it says what was acknowledged.

    python -m tests.key_agent.registry.writing_process registry URL [--careless]
    python -m tests.key_agent.registry.writing_process audit FILE [--careless]

1. It prints N as soon as record N was acknowledged, never before.
2. `--careless` is the control: the same writer on a store that does not sync what it acknowledges. A test
   that finds nothing lost with it proves nothing.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from envelope.keys import NetworkService
from runtime.audit import AuditLog
from runtime.clock import SystemClock
from tests.key_agent.registry.records import NOW_MS, S3, add_service, key_of, open_registry

RECORD = "record"


def owner_of(number: int) -> NetworkService:
    return NetworkService("acme", f"r{number}")


def number_of(owner: NetworkService) -> int:
    """0: none of ours."""
    return int(owner.service[1:]) if owner.service.startswith("r") else 0


async def _write_registry(url: str, *, careless: bool) -> None:
    if careless:
        event.listen(Pool, "checkout", _commit_carelessly)
    registry = await open_registry(url)
    if await registry.current_kek() is None:
        await add_service(registry, S3)
    number = len(await registry.data_keys())
    while True:
        owner = owner_of(number)
        await registry.add_service(
            owner, proxy_id="p1", certificate_pem="PEM", key=key_of(owner), now_ms=NOW_MS
        )
        print(number, flush=True)
        number += 1


def _commit_carelessly(connection: Any, _record: object, _proxy: object) -> None:
    if hasattr(connection, "set_autocommit"):  # psycopg's
        connection.execute("SET synchronous_commit = off")
        connection.commit()
    else:
        connection.execute("PRAGMA synchronous = NORMAL")


def _write_audit(path: Path, *, careless: bool) -> None:
    if careless:
        os.fdatasync = lambda fd: None
    log = AuditLog.open(path, SystemClock())
    number = 1
    while True:
        log.append(RECORD, n=number)
        print(number, flush=True)
        number += 1


def main() -> None:
    store, where, *options = sys.argv[1:]
    careless = "--careless" in options
    if store == "audit":
        _write_audit(Path(where), careless=careless)
    else:
        asyncio.run(_write_registry(where, careless=careless))


if __name__ == "__main__":
    main()
