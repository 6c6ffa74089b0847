"""Two roads to a proxy: the broker where there is one, and always the direct one.

1. Sessions and questions of presence go directly: a challenge is worth something because the proxy's TLS
   certificate vouches for it.
2. Keys go by the broker, and directly at the first missing receipt: the very same envelopes.
3. Withdrawals go both ways at once; whichever proxy's word comes first and is complete counts.
4. Where the direct road is closed, the broker carries what follows an earlier session. Nobody can confirm
   that: it is sent, tried again, and never counts as delivered.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, override

import structlog

from envelope.errors import SealgateError
from key_agent.push.broker import BrokerLink
from key_agent.push.transport import (
    Answer,
    EnvironmentInForce,
    EnvironmentWord,
    Presence,
    Purpose,
    PushError,
    Session,
    Transport,
)
from key_agent.registry.model import Proxy
from runtime.broker import BrokerError

log = structlog.get_logger(__name__)

_CLOSED: Final = frozenset({"timeout", "unreachable"})
DIRECT_PATIENCE_S: Final = 5.0
"""For a session, if the broker could be used instead."""
_LATE_S: Final = 30.0


class BothRoads(Transport):
    def __init__(self, direct: Transport, link: BrokerLink) -> None:
        """*direct* is closed with this one; *link* is run while it is in use (`start`)."""
        self._direct = direct
        self._link = link
        self._running: asyncio.Task[None] | None = None
        self._late: set[asyncio.Task[list[Answer]]] = set()
        """Withdrawals that the other road was faster for: they end by themselves, to keep the connection."""

    def start(self) -> None:
        """Keep the broker's connection up until `close`."""
        self._running = asyncio.create_task(self._link.run(), name="broker")

    @override
    async def open_session(self, proxy: Proxy, *, purpose: Purpose = Purpose.KEYS) -> Session:
        if not self._link.is_open():
            return await self._direct.open_session(proxy, purpose=purpose)
        try:
            async with asyncio.timeout(DIRECT_PATIENCE_S):
                return await self._direct.open_session(proxy, purpose=purpose)
        except TimeoutError:
            pass
        except PushError as error:
            if error.code not in _CLOSED:
                raise
        return Session(proxy_id=proxy.id, challenge=None, time_ms=0, services=())

    @override
    async def presence(self, proxy: Proxy) -> Presence:
        return await self._direct.presence(proxy)

    @override
    async def tell_environment(self, proxy: Proxy, word: EnvironmentWord) -> EnvironmentInForce:
        return await self._direct.tell_environment(proxy, word)

    @override
    async def send(
        self,
        proxy: Proxy,
        tokens: Sequence[str],
        *,
        challenge: bytes | None = None,
        purpose: Purpose = Purpose.KEYS,
    ) -> list[Answer]:
        if challenge is None:
            await self._send_unconfirmed(proxy, tokens, purpose)
        if purpose is Purpose.WITHDRAWAL and challenge is not None and self._link.is_open():
            return await self._send_both_ways(proxy, tokens, challenge)
        if challenge is not None and self._link.is_open(proxy):
            try:
                return await self._link.send(proxy, tokens, challenge=challenge, purpose=purpose)
            except BrokerError as error:
                log.warning("not by the broker, so directly", proxy=proxy.id, reason=str(error))
        return await self._direct.send(proxy, tokens, challenge=challenge, purpose=purpose)

    @override
    async def close(self) -> None:
        tasks: list[asyncio.Task[list[Answer]] | asyncio.Task[None]] = [*self._late]
        if self._running is not None:
            tasks.append(self._running)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._direct.close()

    async def _send_unconfirmed(self, proxy: Proxy, tokens: Sequence[str], purpose: Purpose) -> None:
        try:
            await self._link.publish(proxy, tokens, purpose=purpose)
        except BrokerError as error:
            raise PushError("unreachable", f"{proxy.url} does not answer, nor the broker: {error}") from None
        raise PushError("unconfirmed", f"{proxy.url} does not answer; sent by the broker, unconfirmed")

    async def _send_both_ways(self, proxy: Proxy, tokens: Sequence[str], challenge: bytes) -> list[Answer]:
        purpose = Purpose.WITHDRAWAL
        pending = {
            asyncio.create_task(
                self._direct.send(proxy, tokens, challenge=challenge, purpose=purpose),
                name=f"withdraw-direct:{proxy.id}",
            ),
            asyncio.create_task(
                self._link.send(proxy, tokens, challenge=challenge, purpose=purpose),
                name=f"withdraw-broker:{proxy.id}",
            ),
        }
        answers: list[Answer] = []
        failures: list[Exception] = []
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        answers = _merged(answers, task.result())
                    except SealgateError as failure:
                        failures.append(failure)
                if answers and all(answer.accepted for answer in answers):
                    break
        except BaseException:
            for task in pending:
                task.cancel()
            raise
        for task in pending:
            self._leave(task)
        if answers:
            return answers
        raise next((failure for failure in failures if isinstance(failure, PushError)), None) or PushError(
            "unreachable", "; ".join(map(str, failures))
        )

    def _leave(self, task: asyncio.Task[list[Answer]]) -> None:
        self._late.add(task)
        timer = asyncio.get_running_loop().call_later(_LATE_S, task.cancel)

        def ended(task: asyncio.Task[list[Answer]]) -> None:
            timer.cancel()
            self._late.discard(task)
            if not task.cancelled():
                task.exception()  # looked at: nobody waits for it

        task.add_done_callback(ended)


def _merged(before: list[Answer], now: list[Answer]) -> list[Answer]:
    """An envelope that was accepted on one road is, whatever the other says (`sequence`, as a rule)."""
    if not before:
        return now
    return [one if one.accepted else other for one, other in zip(before, now, strict=True)]
