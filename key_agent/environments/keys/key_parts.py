"""The parts of an agent that bring keys to every environment, wired."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from envelope.keys import NetworkService
from key_agent.environments.keys.manager import Manager
from key_agent.environments.keys.own_wraps import OwnWraps
from key_agent.environments.keys.presented import present, rescued
from key_agent.environments.keys.transport_key import KEY_NAME
from key_agent.environments.keys.wrapping import Wraps
from key_agent.environments.workplace import Workplace
from key_agent.registry.model import HeldKey, Link
from key_agent.rotation import hosts_of, places

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from envelope.keys import KeyState
    from key_agent.agent import Agent


class KeyParts:
    def __init__(self, agent: "Agent", environments: Workplace) -> None:
        """To be made once, before the workplace opens."""
        self._agent = agent
        self._peering = environments.peering
        self.wraps = Wraps(
            peering=self._peering,
            registry=agent.registry,
            source=agent.source,
            proofs=environments.proofs,
            transport_key_file=environments.state_dir / KEY_NAME,
            links=self._links,
            push=self._push,
            journal=agent.journal,
            clock=agent.clock,
            interval_s=agent.rhythm.interval_s,
        )
        self.manager = Manager(
            wraps=self.wraps,
            own_wraps=OwnWraps(
                peering=self._peering,
                registry=agent.registry,
                source=agent.source,
                proofs=environments.proofs,
                journal=agent.journal,
                clock=agent.clock,
            ),
            peering=self._peering,
            journal=agent.journal,
            clock=agent.clock,
            one_at_a_time=agent.one_at_a_time,
            rotate_after_days=agent.rhythm.rotate_after_days,
        )
        agent.registry.presenter = self._present
        environments.routes += [*self.wraps.routes(), *self.manager.routes()]
        environments.tasks += [("manager", self.manager.run), ("deliveries", self.wraps.intake.refusals.run)]

    def _links(self, owners: Collection[NetworkService]) -> list[Link]:
        found = places(self._agent.targets, frozenset(owners))
        return [link for links in found.values() for link in links]

    def _push(self, owners: Collection[NetworkService]) -> None:
        self._agent.refresh.at_once(hosts_of(self._agent.targets, frozenset(owners)))

    def _present(self, service: str, keys: "Sequence[HeldKey]") -> "Mapping[str, KeyState]":
        view = self._peering.view
        states = present(view, self._peering.environment, service, keys)
        return rescued(view, states, now_ms=self._agent.now_ms())
