"""Envelopes that one process of a proxy has opened and every other one has to open as well.

What is passed on is what came: sealed to the network service's certificate, signed by the agent. Each process
checks all of it by itself, with the challenge that the agent answered; that is all it believes.
"""

from typing import Protocol

import msgspec


class Relayed(msgspec.Struct, frozen=True, kw_only=True):
    """One agent's envelopes, in order. `services` and `replaces` tell about each of `tokens`."""

    tenant: str
    agent: str
    challenge: bytes
    """What the agent was given when its session was opened."""
    signing_certificate_der: bytes | None
    """What the agent introduced then; None where the tenant's signers are pinned."""
    tokens: tuple[str, ...]
    services: tuple[str, ...]
    replaces: tuple[bool, ...]
    """True: all that its service had before is void. Also a withdrawal does that."""
    is_challenged: bool
    takes_keys: bool


class Relay(Protocol):
    """The way to the other processes."""

    async def take(self, envelopes: Relayed) -> tuple[str, ...]:
        """When every process that lives has them in force: for each the code of a refusal, "" for none.

        A process that does not answer in time does not live when this returns.
        """
