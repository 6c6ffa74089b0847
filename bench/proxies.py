"""Rows proxy_*: through Sealgate, beside bare mitmproxy and nginx in the same run.

1. Both sides run all the time and are measured in turns: A B A B ..., one round each to warm up first.
2. The figure is what the client sees. CPU of the proxy stands beside it: it tells more where the other core,
   which client and origin share, is the narrower one.
3. Sealgate is the whole product: planner, key cache, sealing, an audit event per message.
"""

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from bench import load
from bench.lab import Lab, lab
from bench.machine import BenchError, Process
from bench.product import Agent
from bench.quota import limited
from bench.results import Row, compare

ROUNDS: Final = 7
SMALL_S: Final = 3.0
CONNECTIONS: Final = 16
MANY_CONNECTIONS: Final = 48
WORKER_SHARE: Final = 0.3
"""Of a core, for each serving process of `proxy_workers_2`: twice that leaves most of two to all else."""
WORKERS_S: Final = 6.0
WORKERS_ROUNDS: Final = 7
MEMORY_BODY_BYTES: Final = 2 << 30
SLOW: Final = "60M"

type Method = Literal["PUT", "GET"]


@dataclass(slots=True)
class Side:
    """One side of a comparison, and what its rounds gave."""

    process: Process
    ca: Path
    agent: Agent | None = None
    rounds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Seconds per GB, or milliseconds per request."""
    p99_ms: list[float] = field(default_factory=list)

    def forget(self) -> None:
        self.rounds.clear()
        self.cpu.clear()
        self.p99_ms.clear()

    def transfer(self, lab: Lab, method: Method, *, http2: bool = False) -> None:
        """MB/s of one big body."""
        url = f"https://localhost:{self.process.port}/{self.process.name}-body"
        size = lab.body.stat().st_size
        before_s = self.process.cpu_s()
        body = lab.body if method == "PUT" else None
        took_s = load.transfer(method, url, ca=self.ca, body=body, http2=http2)
        self.rounds.append(size / 1e6 / took_s)
        self.cpu.append((self.process.cpu_s() - before_s) / (size / 1e9))

    def small(self, method: Method, *, connections: int = CONNECTIONS, seconds: float = SMALL_S) -> None:
        """Requests of 1 KiB per second."""
        before_s = self.process.cpu_s()
        path = f"/{self.process.name}-small-@"
        rate = load.small(
            method, self.process.port, path, ca=self.ca, connections=connections, seconds=seconds
        )
        self._note(rate, before_s, seconds)

    def new_connections(self) -> None:
        """TLS handshakes with one small GET each, per second."""
        before_s = self.process.cpu_s()
        path = f"/{self.process.name}-small-0"
        rate = load.new_connections(
            self.process.port, path, ca=self.ca, connections=CONNECTIONS // 2, seconds=SMALL_S
        )
        self._note(rate, before_s, SMALL_S)

    def _note(self, rate: load.Rate, cpu_before_s: float, seconds: float) -> None:
        self.rounds.append(rate.per_s)
        self.cpu.append((self.process.cpu_s() - cpu_before_s) * 1000 / (rate.per_s * seconds))
        self.p99_ms.append(rate.p99_ms)


def interleave(sides: Sequence[Side], measure: Callable[[Side], None], *, rounds: int = ROUNDS) -> None:
    """A round each that does not count, then *rounds* in turns."""
    for turn in range(-1, rounds):
        for side in sides:
            if side.agent is not None:
                side.agent.refresh()
            measure(side)
            if turn < 0:
                side.forget()


@contextlib.contextmanager
def _sides(*, http2: bool = False, nginx: bool = False) -> Iterator[tuple[Lab, Side, Side, Side | None]]:
    """The laboratory, Sealgate, bare mitmproxy, and nginx if asked for."""
    with contextlib.ExitStack() as running:
        here = running.enter_context(lab())
        product = running.enter_context(here.sealgate(http2=http2))
        ours = Side(product.process, product.ca, product.agent)
        bare = Side(running.enter_context(here.bare()), here.tls.ca)
        peer = Side(running.enter_context(here.nginx()), here.tls.ca) if nginx else None
        yield here, ours, bare, peer


def bulk(method: Method) -> list[Row]:
    """proxy_put_h1 and proxy_put_nginx, or those of GET: 256 MiB, HTTP/1.1, TLS on both sides."""
    verb = method.lower()
    with _sides(nginx=True) as (here, ours, bare, peer):
        if peer is None:
            raise BenchError("nginx was not started")
        sides = (ours, bare, peer)
        if method == "GET":
            interleave(sides, lambda side: side.transfer(here, "PUT"), rounds=0)
        interleave(sides, lambda side: side.transfer(here, method))
    unit = "MB/s"
    return [
        compare(
            f"proxy_{verb}_h1", unit, ours.rounds, bare.rounds,
            goal=1.3 if method == "PUT" else 1.5, **_cpu(ours, bare, "s_per_gb"),
        ),
        compare(
            f"proxy_{verb}_nginx", unit, ours.rounds, peer.rounds, goal=1.0, **_cpu(ours, peer, "s_per_gb")
        ),
    ]  # fmt: skip


def bulk_http2(method: Method) -> list[Row]:
    """proxy_put_h2, proxy_get_h2: the same from an HTTP/2 client, HTTP/1.1 to the origin."""
    with _sides(http2=True) as (here, ours, bare, _):
        sides = (ours, bare)
        if method == "GET":
            interleave(sides, lambda side: side.transfer(here, "PUT", http2=True), rounds=0)
        interleave(sides, lambda side: side.transfer(here, method, http2=True))
    goal = 1.05 if method == "PUT" else 1.5
    name = f"proxy_{method.lower()}_h2"
    return [compare(name, "MB/s", ours.rounds, bare.rounds, goal=goal, **_cpu(ours, bare, "s_per_gb"))]


def small(method: Method) -> list[Row]:
    """proxy_small_put, proxy_small_get: 1 KiB, kept connections, 16 at a time."""
    with _sides() as (_, ours, bare, _nginx):
        if method == "GET":
            interleave((ours, bare), lambda side: side.small("PUT"), rounds=0)
        interleave((ours, bare), lambda side: side.small(method))
    name = f"proxy_small_{method.lower()}"
    extra = _cpu(ours, bare, "ms_per_request") | _p99(ours, bare)
    return [compare(name, "requests/s", ours.rounds, bare.rounds, goal=1.3, **extra)]


def new_connections() -> list[Row]:
    """proxy_new_connections: a handshake and a small GET each, 8 at a time, no resumption by the client."""
    with _sides() as (_, ours, bare, _nginx):
        interleave((ours, bare), lambda side: side.small("PUT"), rounds=0)
        interleave((ours, bare), Side.new_connections)
    extra = _cpu(ours, bare, "ms_per_connection") | _p99(ours, bare)
    name = "proxy_new_connections"
    return [compare(name, "connections/s", ours.rounds, bare.rounds, goal=1.2, **extra)]


def rss_growth() -> list[Row]:
    """proxy_rss_growth: the proxy's memory over idle for 2 GiB up, 2 GiB down, and down to a slow client."""
    with lab(body_bytes=MEMORY_BODY_BYTES) as here, here.sealgate() as product:
        url = f"https://localhost:{product.process.port}/big"
        # Idle means warmed up: its code has run, its allocator has what a transfer takes.
        warm = here.directory / "warm"
        with here.body.open("rb") as body:
            warm.write_bytes(body.read(32 << 20))
        load.transfer("PUT", url, ca=product.ca, body=warm)
        load.transfer("GET", url, ca=product.ca)
        idle = product.process.rss_bytes()
        with _watching(product.process) as peak:
            load.transfer("PUT", url, ca=product.ca, body=here.body)
            load.transfer("GET", url, ca=product.ca)
            product.agent.refresh()
            load.transfer("GET", url, ca=product.ca, limit_rate=SLOW)
    growth = (peak[0] - idle) / (1 << 20)
    extra = {"idle_mib": idle / (1 << 20), "body_bytes": MEMORY_BODY_BYTES}
    # The ratio is the bound's to the growth, so that above 1 is better here as well.
    return [
        Row(name="proxy_rss_growth", value=growth, unit="MiB", baseline=64.0, ratio=64.0 / max(growth, 1.0),
            goal=1.0, extra=extra)
    ]  # fmt: skip


@contextlib.contextmanager
def _watching(process: Process) -> Iterator[list[int]]:
    """Collects the largest resident size seen while the block runs."""
    peak = [process.rss_bytes()]
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], process.rss_bytes())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, name="watch memory")
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def _cpu(ours: Side, theirs: Side, unit: str) -> dict[str, Any]:
    mine, other = statistics.median(ours.cpu), statistics.median(theirs.cpu)
    return {f"cpu_{unit}": mine, f"baseline_cpu_{unit}": other, "cpu_ratio": other / mine if mine else 0.0}


def _p99(ours: Side, theirs: Side) -> dict[str, Any]:
    return {"p99_ms": statistics.median(ours.p99_ms), "baseline_p99_ms": statistics.median(theirs.p99_ms)}


def workers() -> list[Row]:
    """proxy_workers_2: small GETs through two processes behind one port, beside one.

    Every process that serves clients may use `WORKER_SHARE` of a core (bench/quota.py): client and origin
    have the rest, so that a machine of two cores shows what more would. Neither side is pinned.
    """
    used: dict[str, list[float]] = {"one": [], "two": []}
    with contextlib.ExitStack() as running:
        here = running.enter_context(lab())
        sides = []
        for count in (1, 2):
            product = running.enter_context(here.sealgate(name=f"sealgate-{count}", workers=count, core=None))
            # One process serves by itself; several are children of one that serves nobody, and is bounded
            # together with the first of them.
            parent, *children = product.process.pids
            if len(children) != (0 if count == 1 else count):
                raise BenchError(f"{len(children)} worker processes, for {count}")
            running.enter_context(limited([parent, *children[:1]], WORKER_SHARE))
            for pid in children[1:]:
                running.enter_context(limited([pid], WORKER_SHARE))
            sides.append(Side(product.process, product.ca, product.agent))
        before = [side.process.pids for side in sides]
        one, two = sides
        interleave(sides, lambda side: side.small("PUT", connections=MANY_CONNECTIONS), rounds=0)

        def measure(side: Side) -> None:
            before_s = side.process.cpu_s()
            side.small("GET", connections=MANY_CONNECTIONS, seconds=WORKERS_S)
            used["one" if side is one else "two"].append((side.process.cpu_s() - before_s) / WORKERS_S)

        interleave(sides, measure, rounds=WORKERS_ROUNDS)
        if before != [side.process.pids for side in sides]:
            raise BenchError("a worker was replaced: the new one was without a bound")
    return [
        compare(
            "proxy_workers_2",
            "requests/s",
            two.rounds,
            one.rounds,
            goal=1.7,
            cores=os.cpu_count(),
            share_of_a_core_each=WORKER_SHARE,
            cores_used=statistics.median(used["two"]),
            baseline_cores_used=statistics.median(used["one"]),
            p99_ms=statistics.median(two.p99_ms),
            baseline_p99_ms=statistics.median(one.p99_ms),
            cpu_ms_per_request=statistics.median(two.cpu),
            baseline_cpu_ms_per_request=statistics.median(one.cpu),
        )
    ]
