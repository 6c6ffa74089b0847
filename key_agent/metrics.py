"""What the key agent counts. Labels are proxy ids and names from closed sets."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from runtime.observe import NAMESPACE, REGISTRY

HSM_SLOW: Final = Gauge(
    "agent_hsm_slow",
    "1 while the HSM or key server does not answer as soon as it should, 0 otherwise",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
PUSHES: Final = Counter(
    "agent_pushes",
    "Deliveries of keys, by proxy and outcome",
    ["proxy", "outcome"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)
WITHDRAWALS: Final = Counter(
    "agent_withdrawals",
    "Deliveries of withdrawals, by proxy and outcome",
    ["proxy", "outcome"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)
DIAGNOSES: Final = Counter(
    "agent_kek_diagnoses", "Looks at the KEK, by verdict", ["verdict"], namespace=NAMESPACE, registry=REGISTRY
)
STANDING: Final = Gauge(
    "agent_standing",
    "1 for the agent's present standing, 0 for the others",
    ["standing"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)
LAST_ACCEPTED: Final = Gauge(
    "agent_last_accepted_timestamp_seconds",
    "When a proxy last accepted all its keys",
    ["proxy"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)
WITHDRAWALS_PENDING: Final = Gauge(
    "agent_withdrawals_pending",
    "Network services whose keys may be valid at a proxy though they are withdrawn",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
LEADS: Final = Gauge(
    "agent_leads",
    "1 if this agent holds the registry's lease, 0 if it stands by or cannot rely on it",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
TERM: Final = Gauge(
    "agent_term",
    "Fencing term of the registry's lease, of the agent that leads",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
CERTIFICATE_DAYS_LEFT: Final = Gauge(
    "agent_certificate_days_left",
    "Days until the first certificate of a kind ends; -1 if one of them cannot be used",
    ["kind"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)
PROXY_ANSWERS: Final = Gauge(
    "agent_proxy_answers",
    "1 if a proxy answered when it was last asked whether it is there, 0 if not",
    ["proxy"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)
PROXY_CLOCK: Final = Gauge(
    "agent_proxy_clock_ahead_seconds",
    "By how much a proxy's wall clock was ahead of this agent's when it was last asked; negative: behind",
    ["proxy"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)
RETURNS: Final = Counter(
    "agent_proxy_returns",
    "Pushes brought forward because a proxy had restarted or was back",
    ["proxy"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)
BROKER_OPEN: Final = Gauge(
    "agent_broker_open",
    "1 while envelopes can go by the broker, 0 while they go directly only",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
ROTATIONS_OPEN: Final = Gauge(
    "agent_rotations_open",
    "Rotations of keys that have not ended",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
ROTATIONS_STUCK: Final = Gauge(
    "agent_rotations_stuck",
    "Rotations whose new key does not open in the HSM, so that it is not activated",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
FENCING_REJECTS: Final = Counter(
    "fencing_rejects",
    "Writes of managers whose term is over, refused",
    namespace=NAMESPACE,
    registry=REGISTRY,
)
REVOCATION_PROPAGATION: Final = Histogram(
    "revocation_propagation_seconds",
    "From the opening of an incident until everybody who was told has acknowledged it, or holds nothing more",
    buckets=(0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600),
    namespace=NAMESPACE,
    registry=REGISTRY,
)
