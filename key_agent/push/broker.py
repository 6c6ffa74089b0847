"""The agent's end of a broker: NATS JetStream, the same envelopes, receipts back.

1. A delivery counts when its receipts came back, encrypted under the session's challenge. Nothing else that a
   broker says makes it count.
2. The stream keeps messages no longer than they are valid: one that keeps them longer is not used. The agent
   makes the stream if there is none and it may.
3. A proxy whose receipts are missing is left to the direct road for a minute: nothing waits twice.
4. What is not answered is published again, the very same message: it may be lost on its way, its receipts on
   the way back. The proxy takes it once, and repeats what it answered.
5. The connection is kept up beside; while it is down this road is closed, at once and for everybody.
6. Whatever a broker says ends its connection at most, which is then tried again; what was on its way there
   fails as if it were not there (BrokerError): the direct road must never fail with it.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import structlog

from envelope.broker import (
    ALL_DELIVERIES,
    MESSAGE_ID_SIZE,
    BrokeredDelivery,
    agent_tag,
    answer_subject,
    answered_message,
    delivery_subject,
    open_answer,
)
from envelope.errors import FormatError, IntegrityError
from key_agent import metrics
from key_agent.push.transport import Answer, Purpose, read_receipts
from key_agent.registry.model import Proxy
from runtime.broker import (
    RECONNECT_S,
    BrokerError,
    BrokerSettings,
    broker_failures,
    connected,
    in_payloads,
    link_failures,
)
from runtime.clock import Clock

log = structlog.get_logger(__name__)

REST_S: Final = 60.0
"""How long a proxy whose receipts were missing is left to the direct road."""
_PUBLISHED_TIMES: Final = 2
"""Within `receipt_timeout_s`."""
_ASKED_S: Final = 2.0
"""For what the broker itself answers."""
_MAX_PER_SUBJECT: Final = 1000
_HEAD_BYTES: Final = 1024


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Rule 6: the library believes what a broker says (a size that is no number), and raises anything."""
    try:
        yield
    except BrokerError:
        raise
    except Exception as error:
        raise BrokerError(f"the broker is not understood ({type(error).__name__})") from error


class _UnacknowledgedError(BrokerError):
    """The broker did not say whether it has the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    proxy: Proxy
    challenge: bytes
    count: int
    answered: asyncio.Future[list[Answer]]


class BrokerLink:
    """`run` keeps it up; everything else is for the same event loop."""

    def __init__(
        self, settings: BrokerSettings, *, tenant: str, agent_id: str, validity_s: int, clock: Clock
    ) -> None:
        self._settings = settings
        self._agent = agent_tag(tenant, agent_id)
        self._validity_s = validity_s
        self._clock = clock
        self._client: Any = None
        self._waiting: dict[bytes, _Waiting] = {}
        self._resting_until_s: dict[str, float] = {}
        metrics.BROKER_OPEN.set_function(lambda: float(self.is_open()))
        self.failure: str | None = "not connected yet"
        """Why this road is closed; None while it is open."""

    def is_open(self, proxy: Proxy | None = None) -> bool:
        """For *proxy*, or at all."""
        is_up = self._client is not None and self._client.is_connected
        if proxy is None or not is_up:
            return is_up
        return self._clock.boot_s() >= self._resting_until_s.get(proxy.id, 0.0)

    async def run(self) -> NoReturn:
        """Keep the connection up, until cancelled."""
        while True:
            try:
                async with connected(self._settings, name="sealgate-key-agent") as client:
                    await self._prepare(client)
                    self._client, self.failure = client, None
                    log.info("broker connected")
                    while not client.is_closed:
                        await self._clock.sleep(RECONNECT_S)
            except link_failures() as error:
                if self.failure != str(error):
                    log.error("no broker; envelopes go directly", error=str(error))  # noqa: TRY400
                self.failure = str(error)
            except Exception as error:
                # What a broker answers goes through the library first, which believes it (rule 6).
                self.failure = f"not understood: {type(error).__name__}"
                log.exception("the broker's answer ended the connection")
            finally:
                self._client = None
            await self._clock.sleep(RECONNECT_S)

    async def publish(self, proxy: Proxy, tokens: Sequence[str], *, purpose: Purpose) -> None:
        """Hand envelopes that answer no challenge to the broker; nobody will confirm them. BrokerError."""
        with _understood():
            for part in in_payloads(list(tokens), most_bytes=self._most_bytes()):
                delivery = self._delivery(part, is_challenged=False)
                await self._publish(proxy, delivery, purpose, patience_s=self._settings.receipt_timeout_s)

    async def send(
        self,
        proxy: Proxy,
        tokens: Sequence[str],
        *,
        challenge: bytes,
        purpose: Purpose,
        patience_s: float | None = None,
    ) -> list[Answer]:
        """One answer each, in order. BrokerError: not all were answered, whatever became of them.

        *patience_s*: for the answers; None: as the settings say.
        """
        wait_s = patience_s or self._settings.receipt_timeout_s
        with _understood():
            parts = list(in_payloads(list(tokens), most_bytes=self._most_bytes()))
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._send(proxy, part, challenge, purpose, wait_s)) for part in parts
                ]
        failures = [failure for task in tasks if isinstance(failure := task.result(), BrokerError)]
        if failures:
            self._resting_until_s[proxy.id] = self._clock.boot_s() + REST_S
            raise failures[0]
        self._resting_until_s.pop(proxy.id, None)
        return [answer for task in tasks if isinstance(made := task.result(), list) for answer in made]

    async def _send(
        self, proxy: Proxy, tokens: list[str], challenge: bytes, purpose: Purpose, wait_s: float
    ) -> list[Answer] | BrokerError:
        delivery = self._delivery(tokens, is_challenged=True)
        waiting = _Waiting(
            proxy=proxy,
            challenge=challenge,
            count=len(tokens),
            answered=asyncio.get_running_loop().create_future(),
        )
        self._waiting[delivery.message_id] = waiting
        publishing = asyncio.create_task(
            self._keep_publishing(waiting, delivery, purpose), name=f"broker:{proxy.id}"
        )
        try:
            async with asyncio.timeout(wait_s):
                return await waiting.answered
        except TimeoutError:
            return BrokerError(f"no receipts within {wait_s:g} s")
        except BrokerError as error:
            return error
        finally:
            del self._waiting[delivery.message_id]
            publishing.cancel()
            await asyncio.wait([publishing])

    async def _keep_publishing(self, waiting: _Waiting, delivery: BrokeredDelivery, purpose: Purpose) -> None:
        """Until cancelled (rule 4); or the broker refuses it, which is then the answer."""
        again_s = self._settings.receipt_timeout_s / _PUBLISHED_TIMES
        while True:
            next_s = self._clock.boot_s() + again_s
            try:
                await self._publish(waiting.proxy, delivery, purpose, patience_s=again_s)
            except _UnacknowledgedError:
                pass  # whether it is stored or not, the receipts count
            except BrokerError as error:
                if not waiting.answered.done():
                    waiting.answered.set_exception(error)
                return
            await self._clock.sleep(max(0.0, next_s - self._clock.boot_s()))

    def _delivery(self, tokens: list[str], *, is_challenged: bool) -> BrokeredDelivery:
        return BrokeredDelivery(
            message_id=os.urandom(MESSAGE_ID_SIZE),
            agent=self._agent,
            is_challenged=is_challenged,
            tokens=tuple(tokens),
        )

    async def _publish(
        self, proxy: Proxy, delivery: BrokeredDelivery, purpose: Purpose, *, patience_s: float
    ) -> None:
        client = self._client
        if client is None or not client.is_connected:
            raise BrokerError("the broker is not connected")
        subject = delivery_subject(proxy.id, withdraws=purpose is Purpose.WITHDRAWAL)
        try:
            await client.jetstream().publish(
                subject,
                delivery.encode(),
                stream=self._settings.stream,
                timeout=patience_s,
            )
        except TimeoutError:
            raise _UnacknowledgedError(f"not acknowledged within {patience_s:g} s") from None
        except broker_failures() as error:
            raise BrokerError(f"not published ({type(error).__name__})") from None

    def _most_bytes(self) -> int:
        client = self._client
        if client is None:
            raise BrokerError("the broker is not connected")
        return int(client.max_payload) - _HEAD_BYTES

    async def _prepare(self, client: Any) -> None:
        await client.subscribe(answer_subject(self._agent), cb=self._hear)
        await self._check_stream(client.jetstream(timeout=_ASKED_S))

    async def _check_stream(self, jetstream: Any) -> None:
        """The stream is there and forgets in time (rule 2). BrokerError."""
        from nats.js.api import DiscardPolicy, StreamConfig  # noqa: PLC0415 - an extra
        from nats.js.errors import NotFoundError  # noqa: PLC0415

        name = self._settings.stream
        try:
            found = (await jetstream.stream_info(name)).config
        except NotFoundError:
            found = StreamConfig(
                name=name,
                subjects=list(ALL_DELIVERIES),
                max_age=float(self._validity_s),
                max_msgs_per_subject=_MAX_PER_SUBJECT,
                discard=DiscardPolicy.OLD,
            )
            await jetstream.add_stream(found)
            log.info("made the broker's stream", stream=name)
        if not 0 < (found.max_age or 0) <= self._validity_s:
            raise BrokerError(
                f"stream {name} keeps messages for {found.max_age or 0:g} s (0: for ever), longer than the "
                f"{self._validity_s} s that they are valid: set its max-age"
            )

    async def _hear(self, message: Any) -> None:
        """An answer, perhaps; what does not open is nobody's word."""
        try:
            message_id = answered_message(message.data)
            waiting = self._waiting.get(message_id)
            if waiting is None or waiting.answered.done():
                return
            receipts = open_answer(
                message.data,
                challenge=waiting.challenge,
                message_id=message_id,
                agent=self._agent,
                proxy_id=waiting.proxy.id,
            )
        except (FormatError, IntegrityError) as error:
            log.warning("an answer by the broker is not believed", reason=str(error))
            return
        try:
            waiting.answered.set_result(read_receipts(receipts, waiting.count))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            waiting.answered.set_exception(BrokerError(str(error)))
