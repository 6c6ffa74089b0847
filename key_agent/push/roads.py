"""Two roads to a proxy: the broker where there is one, and always the direct one.

1. Sessions and questions of presence go directly: a challenge is worth something because the proxy's TLS
   certificate vouches for it.
2. Keys go by the broker, and directly at the first missing receipt: the very same envelopes.
3. Withdrawals go both ways at once; whichever proxy's word comes first and is complete counts.
4. So do keys for a proxy that cannot be reached directly, as far as its last answer tells: the broker is then
   all there is. It is given more patience, until the direct road answers again, and missing receipts are no
   reason to leave it alone.
5. Without a session the broker carries what follows an earlier one. Nobody can confirm that: it is sent,
   tried again, and never counts as delivered.
"""

import asyncio
from collections.abc import Awaitable, Sequence
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
ALONE_PATIENCE_S: Final = 8.0
"""For receipts by the broker while the direct road is closed: within the usual `push.request_timeout_s`."""
_LATE_S: Final = 30.0


class BothRoads(Transport):
    def __init__(self, direct: Transport, link: BrokerLink) -> None:
        """*direct* is closed with this one; *link* is run while it is in use (`start`)."""
        self._direct = direct
        self._link = link
        self._closed: dict[str, asyncio.Event] = {}
        """Proxies whose direct road did not answer when it was last used; set when it does again."""
        self._running: asyncio.Task[None] | None = None
        self._late: set[asyncio.Task[list[Answer]]] = set()
        """What the other road was faster for: it ends by itself, to keep the connection."""

    def start(self) -> None:
        """Keep the broker's connection up until `close`."""
        self._running = asyncio.create_task(self._link.run(), name="broker")

    @override
    async def open_session(self, proxy: Proxy, *, purpose: Purpose = Purpose.KEYS) -> Session:
        if not self._link.is_open():
            return await self._direct.open_session(proxy, purpose=purpose)
        try:
            async with asyncio.timeout(DIRECT_PATIENCE_S):
                return await self._directly(proxy, self._direct.open_session(proxy, purpose=purpose))
        except TimeoutError:
            pass
        except PushError as error:
            if error.code not in _CLOSED:
                raise
        return Session(proxy_id=proxy.id, challenge=None, time_ms=0, services=())

    @override
    async def presence(self, proxy: Proxy) -> Presence:
        return await self._directly(proxy, self._direct.presence(proxy))

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
        is_alone = purpose is Purpose.KEYS and proxy.id in self._closed
        if challenge is not None and self._link.is_open() and (purpose is Purpose.WITHDRAWAL or is_alone):
            return await self._send_both_ways(proxy, tokens, challenge, purpose)
        if challenge is not None and self._link.is_open(proxy):
            try:
                return await self._link.send(proxy, tokens, challenge=challenge, purpose=purpose)
            except BrokerError as error:
                log.warning("not by the broker, so directly", proxy=proxy.id, reason=str(error))
        return await self._send_directly(proxy, tokens, challenge, purpose)

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

    async def _directly[T](self, proxy: Proxy, asked: Awaitable[T]) -> T:
        """Learn from it whether this road to the proxy is closed (rule 4)."""
        try:
            answer = await asked
        except PushError as error:
            self._note(proxy, is_closed=error.code in _CLOSED)
            raise
        except asyncio.CancelledError:
            self._note(proxy, is_closed=True)  # whoever asked has waited long enough
            raise
        self._note(proxy, is_closed=False)
        return answer

    def _note(self, proxy: Proxy, *, is_closed: bool) -> None:
        if is_closed:
            self._closed.setdefault(proxy.id, asyncio.Event())
        elif (opened := self._closed.pop(proxy.id, None)) is not None:
            opened.set()

    async def _send_directly(
        self, proxy: Proxy, tokens: Sequence[str], challenge: bytes | None, purpose: Purpose
    ) -> list[Answer]:
        sent = self._direct.send(proxy, tokens, challenge=challenge, purpose=purpose)
        return await self._directly(proxy, sent)

    async def _send_unconfirmed(self, proxy: Proxy, tokens: Sequence[str], purpose: Purpose) -> None:
        try:
            await self._link.publish(proxy, tokens, purpose=purpose)
        except BrokerError as error:
            raise PushError("unreachable", f"{proxy.url} does not answer, nor the broker: {error}") from None
        raise PushError("unconfirmed", f"{proxy.url} does not answer; sent by the broker, unconfirmed")

    async def _send_both_ways(
        self, proxy: Proxy, tokens: Sequence[str], challenge: bytes, purpose: Purpose
    ) -> list[Answer]:
        closed = self._closed.get(proxy.id)
        patience_s = None if closed is None else ALONE_PATIENCE_S
        opened = asyncio.create_task((closed or asyncio.Event()).wait(), name=f"opened:{proxy.id}")
        pending = {
            asyncio.create_task(
                self._send_directly(proxy, tokens, challenge, purpose),
                name=f"{purpose}-direct:{proxy.id}",
            ),
            asyncio.create_task(
                self._link.send(proxy, tokens, challenge=challenge, purpose=purpose, patience_s=patience_s),
                name=f"{purpose}-broker:{proxy.id}",
            ),
        }
        answers: list[Answer] = []
        failures: list[Exception] = []
        try:
            while pending:
                await asyncio.wait({*pending, opened}, return_when=asyncio.FIRST_COMPLETED)
                answered = {task for task in pending if task.done()}
                if not answered:
                    break  # the road is open again: what has not arrived by now is better sent anew
                pending -= answered
                for task in answered:
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
        finally:
            opened.cancel()
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
