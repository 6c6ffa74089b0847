"""Callers without a pause, and beside them what HAProxy itself counts: who answered, and who is in rotation.

HAProxy's own numbers are taken and not the callers', so that the demo is not believed because of itself.
"""

import asyncio
import contextlib
import csv
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deploy.demo_environments_callers import Callers
from deploy.demo_environments_chart import Moment
from deploy.stage import DemoError

SAMPLE_S: Final = 0.25


@dataclass
class Recording:
    """What HAProxy itself counts, by server, since the callers began; and what was done meanwhile."""

    began_s: float
    counts: Mapping[str, list[int]]
    times_s: list[float] = field(default_factory=list)
    states: list[dict[str, str]] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def now_s(self) -> float:
        return time.monotonic() - self.began_s


def haproxy_statistics(path: Path) -> dict[str, tuple[int, str]]:
    """By server: answers of 2xx so far, and HAProxy's state of it. OSError while it does not answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)
        connection.connect(str(path))
        connection.sendall(b"show stat\n")
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    rows = csv.DictReader(text.removeprefix("# ").splitlines())
    return {
        row["svname"]: (int(row["hrsp_2xx"] or 0), row["status"])
        for row in rows
        if row["pxname"] == "any" and row["svname"] != "BACKEND"
    }


class LoadOfCallers:
    """The callers, and the recording of HAProxy's counters, in a thread of their own."""

    def __init__(self, callers: Callers, statistics: Path, servers: Iterable[str]) -> None:
        self.callers = callers
        self.recording = Recording(time.monotonic(), {name: [] for name in servers})
        self._statistics = statistics
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="callers")
        self._failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """DemoError if the thread had ended before."""
        self._stop.set()
        self._thread.join(timeout=30)
        if self._failure is not None:
            raise DemoError(f"the callers ended: {self._failure!r}")

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - told by stop()
            self._failure = error

    async def _main(self) -> None:
        calling = asyncio.create_task(self.callers.run(), name="callers")
        while not self._stop.is_set() and not calling.done():
            self._sample()
            await asyncio.sleep(SAMPLE_S)
        self._sample()
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calling

    def _sample(self) -> None:
        found = haproxy_statistics(self._statistics)
        recording = self.recording
        recording.times_s.append(recording.now_s())
        recording.states.append({name: state for name, (_, state) in found.items()})
        for name, counts in recording.counts.items():
            counts.append(found[name][0])
