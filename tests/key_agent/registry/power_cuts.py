"""Power cuts, as a disk that keeps its word leaves them; a process in a mount namespace of its own.

    unshare --mount python -m tests.key_agent.registry.power_cuts DIRECTORY STORE CUTS [--careless]

STORE is `sqlite`, `postgres` or `audit`.

1. The writer's file system (ext4) is an image in an outer file system. Freezing the outer one holds every
   write to the image wherever it is, also amid a sync: a copy is what a cut at that moment leaves.
2. What was acknowledged is noted before the freeze, so it has to be in the copy.
3. When the writer is dead each copy is mounted, which replays ext4's journal, and opened as the next life of
   the program opens it. One JSON object per cut is printed.
4. All mounts, and with them the loop devices, end with the namespace.
"""

import asyncio
import fcntl
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from runtime.audit import AuditLog
from runtime.clock import SystemClock
from tests.key_agent.registry.records import open_registry
from tests.key_agent.registry.writing_process import RECORD, number_of
from tests.postgres import Cluster

_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878
_IMAGE_MIB: Final = {"sqlite": 24, "audit": 24, "postgres": 160}
_OUTER_MARGIN_MIB: Final = 40
_PATIENCE_S: Final = 30.0
NO_MOUNTS: Final = 77
"""Exit status: file systems cannot be mounted here."""


class Writer:
    """The writing process, and the last number that it acknowledged."""

    def __init__(self, store: str, where: str, options: list[str]) -> None:
        kind = "audit" if store == "audit" else "registry"
        words = [sys.executable, "-m", "tests.key_agent.registry.writing_process", kind, where, *options]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE)
        self._news = threading.Condition()
        self.acknowledged = 0
        self._ended = False
        self._listener = threading.Thread(target=self._listen, name="writer", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.acknowledged = int(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, number: int) -> int:
        """The last acknowledged number, as soon as it is at least *number*."""
        with self._news:
            came = self._news.wait_for(
                lambda: self.acknowledged >= number or self._ended, timeout=_PATIENCE_S
            )
            assert came, f"record {number} is not written"
            assert not self._ended, "the writer ended by itself"
            return self.acknowledged

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _make(image: Path, size_mib: int, *options: str) -> None:
    with image.open("xb") as file:
        file.truncate(size_mib << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", *options, str(image)], check=True)


@contextmanager
def _mounted(image: Path, at: Path) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(at)], check=True, stderr=subprocess.PIPE)
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


@contextmanager
def _frozen(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, _FITHAW, 0)
    finally:
        os.close(descriptor)


def cut(directory: Path, store: str, cuts: int, options: list[str]) -> Iterator[dict[str, Any]]:
    """What each of *cuts* left: how many records were acknowledged, how many of them are missing, damage."""
    _make(directory / "outer.img", _IMAGE_MIB[store] + _OUTER_MARGIN_MIB, "-O", "^has_journal")
    acknowledged: list[int] = []
    with _mounted(directory / "outer.img", directory / "outer"):
        image = directory / "outer" / "inner.img"
        _make(image, _IMAGE_MIB[store])
        with _mounted(image, directory / "inner"), _store(store, directory, directory / "inner") as where:
            writer = Writer(store, where, options)
            try:
                for number in range(cuts):
                    writer.wait_for((acknowledged or [0])[-1] + random.randint(1, 30))
                    acknowledged.append(writer.wait_for(0))
                    with _frozen(directory / "outer"):
                        _copy(image, directory / f"{number}.img")
            finally:
                writer.kill()
    for number, last in enumerate(acknowledged):
        copy = directory / f"{number}.img"
        with _mounted(copy, directory / "copy"):
            found, damage = _judge(store, directory, directory / "copy")
        copy.unlink()
        missing = [n for n in range(1, last + 1) if n not in found]
        yield {"acknowledged": last, "missing": len(missing), "damage": damage}


@contextmanager
def _store(store: str, directory: Path, mounted: Path) -> Iterator[str]:
    """An empty one in the file system *mounted*: its path or URL."""
    state = mounted / "state"
    state.mkdir(mode=0o700)
    if store != "postgres":
        yield _path_or_url(store, state)
        return
    cluster = Cluster(directory, data=state / "data")
    cluster.create("--wal-segsize", "1")
    subprocess.run(["sync", "--file-system", str(state)], check=True)  # `initdb` did not
    try:
        yield cluster.url
    finally:
        cluster.kill()


def _path_or_url(store: str, state: Path) -> str:
    return str(state / "audit.jsonl") if store == "audit" else f"sqlite:///{state / 'registry.db'}"


def _copy(image: Path, copy: Path) -> None:
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", str(image), str(copy)], check=True)


def _judge(store: str, directory: Path, mounted: Path) -> tuple[set[int], str | None]:
    """The records that the next life finds, and what it would not accept."""
    state = mounted / "state"
    try:
        if store == "audit":
            return _audited(state / "audit.jsonl"), None
        if store == "sqlite":
            damage = _integrity(state / "registry.db")
            return asyncio.run(_registered(_path_or_url(store, state))), damage
        cluster = Cluster(directory, data=state / "data")
        cluster.start()
        try:
            return asyncio.run(_registered(cluster.url)), None
        finally:
            cluster.stop()
    except Exception as error:  # noqa: BLE001 - it is the finding
        return set(), f"{type(error).__name__}: {error}"


def _audited(path: Path) -> set[int]:
    AuditLog.open(path, SystemClock()).close()  # verifies the chain
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    return {event["n"] for event in events if event["action"] == RECORD}


def _integrity(path: Path) -> str | None:
    database = sqlite3.connect(path)
    [answer] = database.execute("PRAGMA integrity_check").fetchone()
    database.close()
    return None if answer == "ok" else str(answer)


async def _registered(url: str) -> set[int]:
    registry = await open_registry(url)
    sound = await registry.wrapped_keys("k1")  # with the right checksum
    await registry.close()
    return {number_of(key.owner) for key in sound}


def main() -> int:
    directory, store, cuts, *options = sys.argv[1:]
    try:
        for result in cut(Path(directory), store, int(cuts), options):
            print(json.dumps(result), flush=True)
    except subprocess.CalledProcessError as error:
        if error.cmd[0] != "mount":
            raise
        print(error.stderr.decode(errors="replace").strip(), file=sys.stderr)
        return NO_MOUNTS
    return 0


if __name__ == "__main__":
    sys.exit(main())
