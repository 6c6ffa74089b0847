"""Several processes' metrics as one proxy's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from proxy.workers.samples import summed


def process(count: int, *, rss: float, latency_s: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    calls = Counter("sealgate_requests", "Calls", ["outcome"], registry=registry)
    calls.labels("ok").inc(count)
    Gauge("sealgate_active_requests", "At work", registry=registry).set(count)
    Gauge("sealgate_process_resident_memory_bytes", "Memory", registry=registry).set(rss)
    Gauge("sealgate_key_valid_seconds", "Countdown", ["service"], registry=registry).labels("a").set(rss)
    Histogram("sealgate_latency", "Latency", buckets=(0.1, 1.0), registry=registry).observe(latency_s)
    return registry


def test_work_is_summed_and_what_is_one_process_s_stays_its_own() -> None:
    own = process(0, rss=7, latency_s=5)
    others = [process(2, rss=100, latency_s=0.05), process(40, rss=200, latency_s=0.5)]
    Counter("sealgate_only_here", "In one worker only", registry=others[1]).inc(3)
    text = summed(own, [generate_latest(registry) for registry in others]).decode()
    for line in (
        'sealgate_requests_total{outcome="ok"} 42.0',
        "sealgate_active_requests 42.0",
        "sealgate_process_resident_memory_bytes 7.0",
        'sealgate_key_valid_seconds{service="a"} 7.0',
        'sealgate_latency_bucket{le="0.1"} 1.0',
        'sealgate_latency_bucket{le="1.0"} 2.0',
        'sealgate_latency_bucket{le="+Inf"} 3.0',
        "sealgate_latency_count 3.0",
        "sealgate_only_here_total 3.0",
        "# TYPE sealgate_requests_total counter",
    ):
        assert line in text.splitlines(), text
