"""Rows proxy_*: what goes through the proxy, beside bare mitmproxy and nginx in the same run."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from bench import load
from bench.lab import Lab, lab
from bench.machine import Process
from bench.product import Agent
from bench.results import Row, compare

ROUNDS: Final = 7
SMALL_S: Final = 3.0
CONNECTIONS: Final = 16


@dataclass(slots=True)
class Side:
    """One side of a comparison, and what its rounds gave."""

    process: Process
    ca: Path
    agent: Agent | None = None
    rounds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)

    def put(self, lab: Lab, *, http2: bool = False) -> None:
        """MB/s, and CPU seconds of the proxy per GB."""
        self._transfer(lab, "PUT", http2=http2)

    def get(self, lab: Lab, *, http2: bool = False) -> None:
        self._transfer(lab, "GET", http2=http2)

    def _transfer(self, lab: Lab, method: str, *, http2: bool) -> None:
        url = f"https://localhost:{self.process.port}/{self.process.name}-body"
        size = lab.body.stat().st_size
        before = self.process.cpu_s()
        if method == "PUT":
            seconds = load.transfer("PUT", url, ca=self.ca, body=lab.body, http2=http2)
        else:
            seconds = load.transfer("GET", url, ca=self.ca, http2=http2)
        self.rounds.append(size / 1e6 / seconds)
        self.cpu_s.append((self.process.cpu_s() - before) / (size / 1e9))

    def small(self, lab: Lab, method: Literal["PUT", "GET"]) -> None:
        """Requests of 1 KiB per second, and CPU milliseconds of the proxy for each."""
        before = self.process.cpu_s()
        rate = load.small(
            method,
            self.process.port,
            f"/{self.process.name}-small-@",
            ca=self.ca,
            connections=CONNECTIONS,
            seconds=SMALL_S,
        )
        self._note(rate, before)

    def new_connections(self, lab: Lab) -> None:
        before = self.process.cpu_s()
        rate = load.new_connections(
            self.process.port,
            f"/{self.process.name}-small-0",
            ca=self.ca,
            connections=CONNECTIONS // 2,
            seconds=SMALL_S,
        )
        self._note(rate, before)

    def _note(self, rate: load.Rate, cpu_before_s: float) -> None:
        self.rounds.append(rate.per_s)
        self.cpu_s.append((self.process.cpu_s() - cpu_before_s) * 1000 / (rate.per_s * SMALL_S))
        self.p99_ms.append(rate.p99_ms)


def interleave(sides: Sequence[Side], measure: Callable[[Side], None], *, rounds: int = ROUNDS) -> None:
    """One round to warm up, which does not count, then A B A B ..."""
    for side in sides:
        measure(side)
        side.rounds.clear()
        side.cpu_s.clear()
        side.p99_ms.clear()
    for _ in range(rounds):
        for side in sides:
            measure(side)


__all__ = ["ROUNDS", "Lab", "Row", "Side", "compare", "contextlib", "interleave", "lab"]
