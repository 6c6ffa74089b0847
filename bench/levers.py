"""Rows lever_*: what each lever brings to the product, everything else pulled.

CPU is compared, not throughput: client and origin share the other core. The baseline is the same product
without that one lever.
"""

import contextlib
import statistics
from collections.abc import Callable
from typing import Final

from bench.lab import Lab, lab
from bench.proxies import Side, interleave
from bench.results import Row
from proxy.gate.levers import Lever

ROUNDS: Final = 5

# What each lever is for: bulk (CPU seconds per GB), or small requests (CPU milliseconds, and p99 of latency).
_BULK: Final = (Lever.BIG_READS, Lever.DIRECT_TLS, Lever.HTTP1_BODY)
_SMALL: Final = (
    Lever.TRUSTED_MESSAGES,
    Lever.DIRECT_HEADERS,
    Lever.LEAN_CONTEXTS,
    Lever.FROZEN_HEAP,
)
NAMES: Final = tuple(f"lever_{lever.replace('-', '_')}" for lever in (*_BULK, *_SMALL))


def run() -> list[Row]:
    with lab() as here:
        bulk = _without_each(here, _BULK, lambda side: side.transfer(here, "GET"), "s/GB")
        small = _without_each(here, _SMALL, lambda side: side.small("GET"), "ms/request")
        return bulk + small


def _without_each(
    here: Lab, levers: tuple[Lever, ...], measure: Callable[[Side], None], unit: str
) -> list[Row]:
    with contextlib.ExitStack() as running:

        def side(name: str, *without: Lever) -> Side:
            product = running.enter_context(here.sealgate(name=name, without=without))
            return Side(product.process, product.ca, product.agent)

        full = side(f"all-levers-{unit[:2].strip('/')}")
        without = {lever: side(f"without-{lever}", lever) for lever in levers}
        sides = [full, *without.values()]
        interleave(sides, lambda one: one.transfer(here, "PUT"), rounds=0)
        interleave(sides, lambda one: one.small("PUT"), rounds=0)
        interleave(sides, measure, rounds=ROUNDS)
        pulled = statistics.median(full.cpu)
        rows = []
        for lever, other in without.items():
            cpu = statistics.median(other.cpu)
            extra: dict[str, float] = {}
            if other.p99_ms:
                extra = {
                    "p99_ms": statistics.median(full.p99_ms),
                    "baseline_p99_ms": statistics.median(other.p99_ms),
                }
            rows.append(
                Row(
                    name=f"lever_{lever.replace('-', '_')}",
                    value=pulled,
                    unit=f"CPU {unit}",
                    baseline=cpu,
                    ratio=cpu / pulled,
                    extra=extra,
                )
            )
        return rows
