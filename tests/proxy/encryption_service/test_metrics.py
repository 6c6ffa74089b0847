"""What is counted is what Prometheus reads."""

from prometheus_client import CollectorRegistry, generate_latest

from proxy.encryption_service.metrics import BUCKETS_S, MAX_KINDS, ServiceMetrics


def test_counts_and_latencies_become_samples() -> None:
    metrics, registry = ServiceMetrics(), CollectorRegistry()
    registry.register(metrics)
    metrics.called("xks", "encrypt", "ok")
    metrics.called("xks", "encrypt", "ok")
    metrics.called("xks", "encrypt", "revoked")
    for number in range(2 * MAX_KINDS):  # were a caller able to choose it
        metrics.called("xks", f"operation {number}", "ok")
    for latency_s in (BUCKETS_S[0], 0.0002, 0.3, 7.0):  # a bound belongs to its bucket
        metrics.answered("xks", 200, latency_s)
    metrics.answered("transit", 503, 0.001)
    metrics.connections["127.0.0.1:8200"] = 3
    metrics.refused_connections = 2
    text = generate_latest(registry).decode()
    assert text.count("sealgate_service_requests_total{") == MAX_KINDS + 1
    for line in (
        'sealgate_service_requests_total{dialect="xks",operation="encrypt",outcome="ok"} 2.0',
        'sealgate_service_requests_total{dialect="xks",operation="encrypt",outcome="revoked"} 1.0',
        'sealgate_service_answers_total{dialect="xks",status="200"} 4.0',
        'sealgate_service_answers_total{dialect="transit",status="503"} 1.0',
        'sealgate_service_latency_seconds_bucket{dialect="xks",le="0.0001"} 1.0',
        'sealgate_service_latency_seconds_bucket{dialect="xks",le="0.00025"} 2.0',
        'sealgate_service_latency_seconds_bucket{dialect="xks",le="0.25"} 2.0',
        'sealgate_service_latency_seconds_bucket{dialect="xks",le="1.0"} 3.0',
        'sealgate_service_latency_seconds_bucket{dialect="xks",le="+Inf"} 4.0',
        'sealgate_service_latency_seconds_count{dialect="xks"} 4.0',
        'sealgate_service_connections{listener="127.0.0.1:8200"} 3.0',
        "sealgate_service_connections_refused_total 2.0",
    ):
        assert line in text
