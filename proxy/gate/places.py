"""Who of the clients gets a connection: counted at the accept, before a byte is read.

1. A peer has a share of its own: one IPv4 address, or an IPv6 /64, for whoever has one address of it has all.
2. When all places are taken, the connection that waited longest without a request under way gives up its own:
   idle ones, many though they are, do not keep newcomers out. Only if all are busy a newcomer goes.
3. To find it costs the same however many there are: LOOKED_AT are looked at for each newcomer, and who is
   found busy goes to the end of the line.
"""

import ipaddress
from collections import Counter, OrderedDict
from enum import StrEnum
from typing import Final, Protocol

LOOKED_AT: Final = 64


class Refused(StrEnum):
    """Why a connection was closed to begin with, or before its time."""

    PEER = "peer"
    """Its peer has its share."""
    FULL = "full"
    """All are busy."""
    DISPLACED = "displaced"
    """It was idle, and its place was needed."""


class Holder(Protocol):
    """A connection that has a place."""

    @property
    def is_waiting(self) -> bool:
        """Nothing is under way: it may be closed without harm."""

    def displace(self) -> None:
        """Close it; its place is another's already."""


class Places:
    """Of one process. *total* and *per_peer*: how many connections."""

    def __init__(self, total: int, per_peer: int) -> None:
        self._total = total
        self._per_peer = per_peer
        self._holders: OrderedDict[Holder, object] = OrderedDict()
        self._of_peer: Counter[object] = Counter()
        self.refused: Counter[Refused] = Counter()

    def __len__(self) -> int:
        return len(self._holders)

    def take(self, holder: Holder, address: str) -> Refused | None:
        """Give *holder* a place, or say why it gets none. *address*: its peer's, as the socket says."""
        peer = peer_of(address)
        refused = None
        if self._of_peer[peer] >= self._per_peer:
            refused = Refused.PEER
        elif len(self._holders) >= self._total and not self._make_room():
            refused = Refused.FULL
        if refused is not None:
            self.refused[refused] += 1
            self._forget_unused(peer)
            return refused
        self._holders[holder] = peer
        self._of_peer[peer] += 1
        return None

    def give_back(self, holder: Holder) -> None:
        """*holder* is over. It need not have a place, or still have it."""
        peer = self._holders.pop(holder, None)
        if peer is not None:
            self._of_peer[peer] -= 1
            self._forget_unused(peer)

    def _make_room(self) -> bool:
        for _ in range(min(LOOKED_AT, len(self._holders))):
            oldest = next(iter(self._holders))
            if oldest.is_waiting:
                self.give_back(oldest)
                self.refused[Refused.DISPLACED] += 1
                oldest.displace()
                return True
            self._holders.move_to_end(oldest)
        return False

    def _forget_unused(self, peer: object) -> None:
        if not self._of_peer[peer]:
            del self._of_peer[peer]


def peer_of(address: str) -> object:
    """What the connections from *address* are counted by (rule 1)."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return ip.ipv4_mapped or int(ip) >> 64
    return ip
