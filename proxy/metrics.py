"""What the proxy counts. Labels are names out of the directory and codes out of the refusals' table."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, override

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from envelope.keys import NetworkService
from runtime.observe import NAMESPACE

OK: Final = "ok"


class ProxyMetrics:
    """The proxy's counters in *registry*: one instance per registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        service = ("tenant", "service")
        self._requests = Counter(
            "requests",
            "Requests by what became of them: ok, or the refusal's code",
            (*service, "plan", "outcome"),
            namespace=NAMESPACE,
            registry=registry,
        )
        self._sealed = Counter(
            "sealed_bytes", "Plaintext bytes sealed", service, namespace=NAMESPACE, registry=registry
        )
        self._opened = Counter(
            "opened_bytes", "Plaintext bytes opened", service, namespace=NAMESPACE, registry=registry
        )
        self._legacy = Counter(
            "legacy_passed",
            "Answers that were not sealed and passed under the migrate policy",
            service,
            namespace=NAMESPACE,
            registry=registry,
        )
        self.tunnelled = Counter(
            "tunnelled_connections",
            "Connections passed through unread",
            ("tenant",),
            namespace=NAMESPACE,
            registry=registry,
        )
        self.cut = Counter(
            "connections_cut",
            "Connections cut because the key of a body in flight ended",
            namespace=NAMESPACE,
            registry=registry,
        )
        self.active = Gauge("active_requests", "Requests in flight", namespace=NAMESPACE, registry=registry)
        self._cache: dict[NetworkService, ServiceMeters] = {}
        self._counters: dict[tuple[NetworkService | None, str, str], Counter] = {}
        """The children of `_requests`: looking one up costs more than counting."""

    def of(self, owner: NetworkService) -> "ServiceMeters":
        meters = self._cache.get(owner)
        if meters is None:
            names = (owner.tenant, owner.service)
            meters = self._cache[owner] = ServiceMeters(
                self._sealed.labels(*names), self._opened.labels(*names), self._legacy.labels(*names)
            )
        return meters

    def count(self, owner: NetworkService | None, plan: str, outcome: str) -> None:
        """One request has ended. *owner* None: it was refused before a service was found."""
        key = (owner, plan, outcome)
        counter = self._counters.get(key)
        if counter is None:
            names = (owner.tenant, owner.service) if owner is not None else ("", "")
            counter = self._counters[key] = self._requests.labels(*names, plan, outcome)
        counter.inc()


class ServiceMeters:
    """The counters of one service, looked up once."""

    __slots__ = ("legacy", "opened", "sealed")

    def __init__(self, sealed: Counter, opened: Counter, legacy: Counter) -> None:
        self.sealed: Final = sealed.inc
        self.opened: Final = opened.inc
        self.legacy: Final = legacy.inc


class ClientConnections(Collector):
    """The client connections of the listeners: how many, and what became of those beyond a limit."""

    def __init__(
        self,
        count: Callable[[], int],
        *,
        refused: Callable[[], Mapping[str, int]],
        expired: Callable[[], Mapping[str, int]],
    ) -> None:
        """*refused*: by reason, *expired*: by what was waited for; all of them, also those that are 0."""
        self._count = count
        self._refused = refused
        self._expired = expired

    @override
    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        yield GaugeMetricFamily(
            f"{NAMESPACE}_client_connections", "Connections of clients that are open", value=self._count()
        )
        refused = CounterMetricFamily(
            f"{NAMESPACE}_client_connections_refused",
            "Connections closed for want of a place, by reason",
            labels=("reason",),
        )
        expired = CounterMetricFamily(
            f"{NAMESPACE}_client_connections_expired",
            "Connections closed because their time was over, by what was waited for",
            labels=("phase",),
        )
        for family, counts in ((refused, self._refused()), (expired, self._expired())):
            for label, number in counts.items():
                family.add_metric((label,), number)
            yield family
