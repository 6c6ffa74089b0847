"""Who has heard of what was taken away: environments, their proxies, and the load balancers.

1. A proxy is clear of it once it has acknowledged an envelope that was made afterwards, or a withdrawal, or
   once everything that was ever sent to it has ended. Until then it is told how long that may take: nobody
   who is silent is taken for somebody who agrees.
2. What was sent is remembered when the agent hears of the change. An agent that has started since remembers
   the moment of its start: later is on the safe side.
3. A load balancer acknowledges by its own TLS identity, again and again; it is live while it does. It has
   confirmed an epoch when it acknowledged that one or a newer one.
4. All of this is observation: volatile, unsigned, of no force but to be waited for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import KeyState
from key_agent.environments.shared.registry_lease import Position
from key_agent.registry.model import Link

if TYPE_CHECKING:
    from key_agent.environments.shared.shared_view import Shared

LB_ACK_PATH: Final = "/v1/env/lb-ack"
CONTAINMENT_PATH: Final = "/v1/env/containment"
LIVE_S: Final = 15.0
"""A load balancer that has acknowledged nothing for so long is not live."""
MAX_LOAD_BALANCERS: Final = 64
MAX_MARKS: Final = 64
_DISABLED: Final = (KeyState.SUSPENDED, KeyState.COMPROMISED, KeyState.DESTROYED)

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=127)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class LbAck(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Up to which position of the registry a load balancer has acted, and what it answers for each server."""

    load_balancer: _Name
    term: _Number
    epoch: _Number
    answers: Annotated[dict[_Name, _Name], msgspec.Meta(max_length=64)] = {}
    """Environment -> the line that HAProxy gets."""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One network service at one proxy."""

    service: _Name
    proxy: _Name
    is_clear: bool
    cause: _Name
    """acknowledged, ended, or silent."""
    holds_until_ms: _Number | None = None
    """While it is not clear: when it is at the latest."""


class Places(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an environment's agent knows of its own proxies."""

    environment: _Name
    term: _Number
    epoch: _Number
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class LoadBalancer:
    name: str
    position: Position
    is_live: bool
    answers: Mapping[str, str]


class LoadBalancers:
    """What they have acknowledged here."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[LbAck, float]] = {}

    def acknowledged(self, agent_id: str, ack: LbAck, *, now_boot_s: float) -> None:
        """*agent_id*: proven by the certificate. FormatError: in whose name is it?"""
        if ack.load_balancer != agent_id:
            raise FormatError(f"{agent_id} acknowledges in the name of {ack.load_balancer}")
        if agent_id not in self._heard and len(self._heard) >= MAX_LOAD_BALANCERS:
            silent = [name for name, (_, at_s) in self._heard.items() if now_boot_s - at_s > LIVE_S]
            if not silent:
                raise FormatError(f"{MAX_LOAD_BALANCERS} load balancers are known already")
            del self._heard[silent[0]]
        known = self._heard.get(agent_id)
        if known is None or _position(ack) >= _position(known[0]):
            self._heard[agent_id] = (ack, now_boot_s)

    def all(self, *, now_boot_s: float) -> list[LoadBalancer]:
        return [
            LoadBalancer(name, _position(ack), now_boot_s - at_s <= LIVE_S, ack.answers)
            for name, (ack, at_s) in sorted(self._heard.items())
        ]

    def confirmed(self, position: Position, *, now_boot_s: float) -> tuple[list[str], list[str]]:
        """Live ones that have, and that have not, acknowledged *position* or a newer one."""
        live = [one for one in self.all(now_boot_s=now_boot_s) if one.is_live]
        have = [one.name for one in live if one.position >= position]
        return have, [one.name for one in live if one.position < position]


def _position(ack: LbAck) -> Position:
    return Position(ack.term, ack.epoch)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What had been sent to a place when something was taken away."""

    sequence: int
    until_ms: int


type _PlaceName = tuple[str, str]


class Containment:
    """What this agent's own proxies have acknowledged since something was taken away."""

    def __init__(self, links: Iterable[Link], view: "Shared") -> None:
        """*links*, *view*: as the agent finds them when it starts (rule 2)."""
        self._marks: dict[int, dict[_PlaceName, _Sent]] = {view.epoch: _sent(links)}

    def changed(self, before: "Shared", view: "Shared", own: str, links: Iterable[Link]) -> None:
        """The rows have changed; *links* as they are now, *own*: this environment."""
        if not _takes_away(before, view, own):
            return
        self._marks[view.epoch] = _sent(links)
        while len(self._marks) > MAX_MARKS:
            del self._marks[min(self._marks)]

    def places(self, epoch: int, links: Iterable[Link], *, now_ms: int, now_boot_s: float) -> list[Place]:
        """How far every place is with what was taken away at *epoch*, or later where that is not known."""
        later = [mark for mark in self._marks if mark >= epoch]
        sent = self._marks[min(later) if later else max(self._marks)]
        return [
            _place(link, sent.get(_name(link)), now_ms=now_ms, now_boot_s=now_boot_s)
            for link in sorted(links, key=_name)
        ]


def _sent(links: Iterable[Link]) -> dict[_PlaceName, _Sent]:
    return {_name(link): _Sent(link.issued_sequence, link.silent_at_ms) for link in links}


def _name(link: Link) -> _PlaceName:
    return str(link.owner), link.proxy_id


def _place(link: Link, sent: _Sent | None, *, now_ms: int, now_boot_s: float) -> Place:
    service, proxy = _name(link)
    if sent is None or sent.sequence == 0:
        return Place(service=service, proxy=proxy, is_clear=True, cause="ended")
    if max(link.accepted_sequence, link.withdrawn_sequence) > sent.sequence:
        return Place(service=service, proxy=proxy, is_clear=True, cause="acknowledged")
    if link.withdrawn_sequence == sent.sequence:
        return Place(service=service, proxy=proxy, is_clear=True, cause="acknowledged")
    if now_ms >= sent.until_ms and (
        now_boot_s >= link.issued_until_boot_s or link.issued_sequence > sent.sequence
    ):
        return Place(service=service, proxy=proxy, is_clear=True, cause="ended")
    return Place(
        service=service, proxy=proxy, is_clear=False, cause="silent", holds_until_ms=max(0, sent.until_ms)
    )


def _takes_away(before: "Shared", view: "Shared", own: str) -> bool:
    """Whether anybody holds something now that they should not hold any more."""
    for key_id, dek in view.deks.items():
        known = before.deks.get(key_id)
        if dek.state in _DISABLED and (known is None or known.state not in _DISABLED):
            return True
    mine, was = view.environments.get(own), before.environments.get(own)
    return was is not None and was.state.pushes and (mine is None or not mine.state.pushes)
