"""What the encryption service counts: calls by dialect, operation and outcome, answers and their latency.

1. A count is a dictionary's: prometheus-client's own counters cost ten times as much, and a call is made of
   microseconds. They become samples when somebody asks.
2. Labels are names of dialects, operations and outcomes out of our own tables. Should one ever follow a
   caller's text, there are MAX_KINDS of them and no more.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, override

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.observe import NAMESPACE

BUCKETS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""0.25 s is what AWS KMS waits for an answer."""
MAX_KINDS: Final = 1000
_OTHER: Final = "other"


class _Latency:
    """A histogram of one dialect's answers."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class ServiceMetrics(Collector):
    """Of one process; one event loop."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str, str], int] = {}
        self._answers: dict[tuple[str, int], int] = {}
        self._latency: dict[str, _Latency] = {}
        self.connections: dict[str, int] = {}
        """Open ones, by listener."""
        self.refused_connections = 0

    def called(self, dialect: str, operation: str, outcome: str) -> None:
        """A call was recorded."""
        key = (dialect, operation, outcome)
        if key not in self._calls and len(self._calls) >= MAX_KINDS:
            key = (dialect, _OTHER, _OTHER)
        self._calls[key] = self._calls.get(key, 0) + 1

    def answered(self, dialect: str, status: int, latency_s: float) -> None:
        """An answer left, *latency_s* after its request's head was here."""
        key = (dialect, status)
        self._answers[key] = self._answers.get(key, 0) + 1
        latency = self._latency.get(dialect)
        if latency is None:
            latency = self._latency[dialect] = _Latency()
        latency.counts[bisect_left(BUCKETS_S, latency_s)] += 1
        latency.sum_s += latency_s

    @override
    def collect(self) -> Iterable[Metric]:
        calls = CounterMetricFamily(
            f"{NAMESPACE}_service_requests",
            "Calls of the encryption service by what became of them",
            labels=("dialect", "operation", "outcome"),
        )
        for names, count in self._calls.items():
            calls.add_metric(names, count)
        answers = CounterMetricFamily(
            f"{NAMESPACE}_service_answers", "HTTP answers", labels=("dialect", "status")
        )
        for (dialect, status), count in self._answers.items():
            answers.add_metric((dialect, str(status)), count)
        latency = HistogramMetricFamily(
            f"{NAMESPACE}_service_latency_seconds", "From a request's head to its answer", labels=("dialect",)
        )
        for dialect, seen in self._latency.items():
            latency.add_metric((dialect,), seen.buckets(), seen.sum_s)
        connections = GaugeMetricFamily(
            f"{NAMESPACE}_service_connections", "Open connections", labels=("listener",)
        )
        for listener, count in self.connections.items():
            connections.add_metric((listener,), count)
        refused = CounterMetricFamily(
            f"{NAMESPACE}_service_connections_refused",
            "Connections beyond a listener's bounds, or without TLS",
        )
        refused.add_metric((), self.refused_connections)
        return (calls, answers, latency, connections, refused)
