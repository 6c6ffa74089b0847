"""The metrics of several processes as those of one proxy.

1. Counters and histograms are summed. So are gauges that count something at work (connections, requests).
2. What is about one process (its memory, its collector) is the first process's own: sums would mean nothing.
   What is about the proxy (how long keys are good) the first process knows; the workers' copies are dropped.
"""

from collections.abc import Iterable, Sequence
from typing import Final, override

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from runtime.observe import NAMESPACE

_OF_ONE_PROCESS: Final = (f"{NAMESPACE}_process_", "python_", f"{NAMESPACE}_key_", "process_")


class Summed(Collector):
    """The samples of *texts*, Prometheus text of one process each, summed into those of *own*."""

    def __init__(self, own: CollectorRegistry, texts: Sequence[bytes]) -> None:
        self._own = own
        self._texts = texts

    @override
    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        own = generate_latest(self._own).decode()
        for number, text in enumerate((own, *(text.decode() for text in self._texts))):
            for family in text_string_to_metric_families(text):
                if number and family.name.startswith(_OF_ONE_PROCESS):
                    continue
                found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                sums = values.setdefault(family.name, {})
                for sample in family.samples:
                    if sample.name.endswith("_created"):
                        continue
                    key = (sample.name, tuple(sorted(sample.labels.items())))
                    sums[key] = sums.get(key, 0.0) + sample.value
        for name, metric in found.items():
            for (sample_name, labels), value in values[name].items():
                metric.add_sample(sample_name, dict(labels), value)
            yield metric


def summed(own: CollectorRegistry, texts: Sequence[bytes]) -> bytes:
    """Prometheus text of the whole proxy."""
    registry = CollectorRegistry()
    registry.register(Summed(own, texts))
    return generate_latest(registry)
