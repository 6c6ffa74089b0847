"""How many clients of the listeners there may be, and how long each may take: the settings' [limits].

1. Every wait for a client has an end. A body that moves is not ended, however slowly it moves: there is no
   time for all of it, only for its next piece.
2. Memory is bounded by counting connections: what one may cost is bounded elsewhere (`gate`).
"""

from typing import Final

import msgspec

RESERVED_DESCRIPTORS: Final = 256
"""For listeners, logs, databases, key agents, whose calls must get through when clients are many."""
CLIENTS_OF_FOUR: Final = 3
"""Of four other descriptors so many are for clients, one for connections to services: most clients wait."""


class ClientLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the forward and reverse listeners of one process, all together."""

    connections: int = 16_384
    """Beyond it the connection that has been idle for longest makes room; if none is idle, newcomers go."""
    connections_per_peer: int = 4_096
    """From one IPv4 address or IPv6 /64. Behind a load balancer or NAT all clients have one address."""
    handshake_s: float = 15.0
    """From the opening of a connection, or the answer to CONNECT, to the end of the TLS handshake or, in the
    clear, to the first request."""
    head_s: float = 30.0
    """From the first byte of a request to the end of its head."""
    keep_alive_s: float = 90.0
    """Without a request. Counted from when it is noticed: it may become twice as long."""
    idle_s: float = 600.0
    """While a request or a tunnel is under way: without a byte from either side."""

    def __post_init__(self) -> None:
        for name in ("connections", "connections_per_peer"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise ValueError(f"limits.{name} must be between 1 and 1000000, not {getattr(self, name)}")
        for name in ("handshake_s", "head_s", "keep_alive_s", "idle_s"):
            if not 0.1 <= getattr(self, name) <= 86_400:
                raise ValueError(f"limits.{name} must be between 0.1 and 86400, not {getattr(self, name):g}")

    def places(self, open_files: int) -> int:
        """How many connections there can be where the process may open *open_files* files; at least one."""
        left = (open_files - RESERVED_DESCRIPTORS) * CLIENTS_OF_FOUR // 4
        return max(1, min(self.connections, left))
