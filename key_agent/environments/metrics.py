"""What operators' monitoring sees of several environments, from the eyes of one agent.

1. Everything is read when somebody asks, from what the agent acts on: there is no second account that could
   differ from it. Nothing here waits or changes anything.
2. An agent without several environments serves none of it: `sealgate_env_serves` is no 0 that means nothing.
3. A figure that is not known has no sample: how far an environment is behind that never answered, what one
   lacks that this agent does not serve with keys.
4. Labels are names of environments and states.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final, override

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from envelope.keys import KeyState
from key_agent.consent import EnvironmentStanding
from key_agent.environments.keys.bringing import Standing
from key_agent.environments.peers.peering import Peering
from key_agent.environments.peers.telling import Told
from key_agent.environments.states import EnvironmentState
from runtime.observe import NAMESPACE

_DESCRIPTIONS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "env_state": (
        "1 for an environment's state in the signed rows, 0 for the others",
        ("environment", "state"),
    ),
    "env_answers": ("1 if another environment's agent answered when it was last asked", ("environment",)),
    "env_serves": ("1 while this environment may serve, 0 while it is withdrawn or not proven", ()),
    "env_lease_seconds": ("Until this environment that serves has to stop, unless it hears a majority", ()),
    "env_lacks_keys": (
        "Keys that an environment lacks though it was served with them; at the manager",
        ("environment",),
    ),
    "env_unaware_proxies": ("Proxies that do not act on what this environment is", ()),
    "env_incidents_open": ("Incidents that are neither closed nor cancelled", ()),
    "dek_state": ("Data keys of all environments, by state", ("state",)),
    "registry_epoch": ("Epoch of the shared registry that this agent has", ()),
    "registry_lag_epochs": ("By how many epochs another environment is behind this one", ("environment",)),
    "registry_tampered": ("1 while the shared rows of this environment's database are not as written", ()),
}


def families() -> dict[str, GaugeMetricFamily]:
    """All that is served of several environments, without samples; by name without `sealgate_`."""
    return {
        name: GaugeMetricFamily(f"{NAMESPACE}_{name}", description, labels=labels)
        for name, (description, labels) in _DESCRIPTIONS.items()
    }


class EnvironmentMetrics(Collector):
    """Register it while the environments work. *told* and *standings*: as telling.py and bringing.py say."""

    def __init__(
        self,
        peering: Peering,
        *,
        told: Callable[[], Mapping[str, Told]],
        standings: Callable[[], Mapping[str, Standing]],
    ) -> None:
        self._peering = peering
        self._told = told
        self._standings = standings

    @override
    def collect(self) -> Iterable[Metric]:
        found = families()
        for name, labels, value in self._samples():
            found[name].add_metric(labels, value)
        return found.values()

    def _samples(self) -> Iterable[tuple[str, tuple[str, ...], float]]:
        peering = self._peering
        view = peering.view
        yield "env_serves", (), peering.verdict.standing is EnvironmentStanding.SERVES
        lease_left_s = peering.lease_left_s()
        if lease_left_s is not None:
            yield "env_lease_seconds", (), lease_left_s
        yield "registry_epoch", (), view.epoch
        yield "registry_tampered", (), peering.tampered is not None
        yield "env_incidents_open", (), sum(not body.state.is_over for body in view.incidents.values())
        yield "env_unaware_proxies", (), sum(told.error is not None for told in self._told().values())
        for environment, body in view.environments.items():
            for state in EnvironmentState:
                yield "env_state", (environment, state), body.state is state
        for environment in peering.others():
            sight = peering.sights.get(environment)
            yield "env_answers", (environment,), sight is not None and sight.answers
            if sight is not None and sight.position is not None:
                yield "registry_lag_epochs", (environment,), max(0, view.epoch - sight.position.epoch)
        by_state = Counter(body.state for body in view.deks.values())
        for key_state in KeyState:
            yield "dek_state", (key_state,), by_state[key_state]
        if peering.leads:
            for environment, standing in self._standings().items():
                if environment in view.environments:
                    yield "env_lacks_keys", (environment,), len(standing.failed)
