"""The proxy's end of a broker: envelopes out of a JetStream stream, receipts back.

1. Who sent a message is found among the sessions that agents have opened directly, by its tag. A message of
   nobody's session is dropped.
2. An envelope is judged as one that came directly; if it answers no challenge, by the rule for brokers. Who
   may not push directly (push.py, rule 4) brings and takes back nothing by this road either.
3. Receipts go back encrypted under the session's challenge (envelope/broker.py); without one, none do.
4. Withdrawals have a subject and a loop of their own: they wait for no keys.
5. A message that comes again, whole and as it was, is answered as before, by the same bytes, and changes
   nothing: agents repeat what nobody answered, and brokers what nobody acknowledged.
6. A process begins with what is published from now on: it has no sessions for what was before. After a broker
   was away it goes on where it stopped; what is stale by then is refused as such.
7. What the broker itself does not answer is asked again before the connection is given up.
8. Each agent's messages are slowed down to a rate, and taken one at a time: a broker cannot flood a proxy.
9. Whatever a broker says ends its connection at most, never the proxy: what it carries comes directly too.
"""

import asyncio
import functools
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, NoReturn

import structlog
from cachetools import TTLCache
from prometheus_client import Counter

from envelope.broker import BrokeredDelivery, answer_subject, decode_delivery, delivery_subject, seal_answer
from envelope.errors import FormatError
from proxy.api.push import BURST_FACTOR, Entitled, TokenBucket
from proxy.environments import ForeignAgentError
from proxy.keys.receive import Receiver
from runtime.broker import RECONNECT_S, BrokerSettings, connected, link_failures
from runtime.clock import Clock
from runtime.observe import NAMESPACE, REGISTRY

WAIT_S: Final = 5.0
"""Without messages, until we ask whether our place in the stream is still there."""
ASK_S: Final = 2.0
"""For the broker's own answers."""
ASKED_TIMES: Final = 5
ANSWERS_BYTES: Final = 4 << 20
ANSWERS_S: Final = 60.0
"""How many answers are kept, and for how long: agents wait for less (`nats.receipt_timeout_s`)."""
MAX_UNACKNOWLEDGED: Final = 16
"""More than one: what a killed broker has forgotten the acknowledgement of must not hold up the rest. Not
many: they are in our memory."""
TAKEN_AGAIN_S: Final = 5.0
"""What we have not acknowledged for so long comes once more."""
PENDING_BYTES: Final = 32 << 20
PENDING_MESSAGES: Final = 64
"""More than MAX_UNACKNOWLEDGED: what a broker sends beyond is dropped."""
FORGOTTEN_AFTER_S: Final = 600.0
"""The broker drops our place in the stream if we do not come for so long."""
_MAX_AGENTS: Final = 1024

_log: Final = structlog.get_logger("broker")
_MESSAGES: Final = Counter(
    "push_broker_messages",
    "Messages from the broker, by what they were",
    ["outcome"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)


class BrokerListener:
    def __init__(
        self,
        settings: BrokerSettings,
        receiver: Receiver,
        *,
        clock: Clock,
        requests_per_s: float,
        entitled: Entitled,
    ) -> None:
        """*entitled*: who may push, as of the push listener."""
        self._entitled = entitled
        self._settings = settings
        self._receiver = receiver
        self._clock = clock
        self._requests_per_s = requests_per_s
        self._buckets: dict[tuple[str, str, bool], TokenBucket] = {}
        self._answers: TTLCache[bytes, bytes] = TTLCache(
            maxsize=ANSWERS_BYTES, ttl=ANSWERS_S, timer=clock.boot_s, getsizeof=len
        )
        """By the digest of a message: what it was answered."""
        self._seen: dict[bool, datetime] = {}
        """Of the last message of each loop: when the broker stored it."""
        self.failure: str | None = "not connected yet"
        """Why nothing comes from the broker; None while all is well."""

    async def run(self) -> NoReturn:
        """Listen, until cancelled."""
        while True:
            try:
                async with (
                    connected(self._settings, name="sealgate-proxy") as client,
                    asyncio.TaskGroup() as group,
                ):
                    for withdraws in (True, False):
                        group.create_task(
                            self._consume(client, withdraws=withdraws), name=f"broker:{withdraws}"
                        )
            except* link_failures() as errors:
                text = "; ".join(sorted({str(error) or type(error).__name__ for error in errors.exceptions}))
                if self.failure != text:
                    _log.warning("nothing comes from the broker", error=text)
                self.failure = text
            except* Exception as errors:  # noqa: BLE001 - logged whole
                # What a broker answers goes through the library first, which believes it (rule 9).
                self.failure = f"not understood: {_names(errors)}"
                _log.exception("the broker's answer ended the connection")
            await self._clock.sleep(RECONNECT_S)

    async def _consume(self, client: Any, *, withdraws: bool) -> NoReturn:
        """The messages of one subject. The client's errors, when the place in the stream is lost."""
        inbox, still_there = await self._subscribe(client, withdraws=withdraws)
        if self.failure is not None:
            _log.info("listening at the broker")
            self.failure = None
        while True:
            try:
                message = await inbox.next_msg(timeout=WAIT_S)
            except TimeoutError:
                # Nothing came; or the broker is gone, or was, and our place with it: this raises then.
                await _answered(client, still_there)
                continue
            self._seen[withdraws] = message.metadata.timestamp
            await self._take(client, message.data, withdraws=withdraws)
            await message.ack()

    async def _subscribe(
        self, client: Any, *, withdraws: bool
    ) -> tuple[Any, Callable[[], Awaitable[object]]]:
        """Where the messages of one subject come in, and how to ask whether they still do.

        The broker is not asked for each: a request that it does not hear would hold up all that wait.
        """
        from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy  # noqa: PLC0415 - an extra

        since = self._seen.get(withdraws)
        name = secrets.token_hex(16)  # ours: asked for twice it is one place
        config = ConsumerConfig(
            name=name,
            filter_subject=delivery_subject(self._receiver.proxy_id, withdraws=withdraws),
            deliver_subject=client.new_inbox(),
            deliver_policy=DeliverPolicy.NEW if since is None else DeliverPolicy.BY_START_TIME,
            opt_start_time=since,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=TAKEN_AGAIN_S,
            max_ack_pending=MAX_UNACKNOWLEDGED,
            inactive_threshold=FORGOTTEN_AFTER_S,
        )
        inbox = await client.subscribe(
            config.deliver_subject, pending_msgs_limit=PENDING_MESSAGES, pending_bytes_limit=PENDING_BYTES
        )
        stream, place = client.jetstream(timeout=ASK_S), self._settings.stream
        await _answered(client, functools.partial(stream.add_consumer, place, config))
        return inbox, functools.partial(stream.consumer_info, place, name)

    async def _take(self, client: Any, content: bytes, *, withdraws: bool) -> None:
        try:
            delivery = decode_delivery(content)
        except FormatError as error:
            _MESSAGES.labels(outcome="malformed").inc()
            _log.warning("a message of the broker is not understood", reason=str(error))
            return
        subject = answer_subject(delivery.agent, self._receiver.proxy_id)
        name = sha256(content).digest()
        if (known := self._answers.get(name)) is not None:
            _MESSAGES.labels(outcome="repeated").inc()
            await client.publish(subject, known)
            return
        session = self._receiver.sessions.of_tag(delivery.agent)
        if session is None:
            _MESSAGES.labels(outcome="unknown-agent").inc()
            return
        await self._slow_down(session.tenant, session.agent_id, withdraws=withdraws)
        try:
            self._entitled(session.tenant, session.agent_id)
            receipts = await self._receiver.receive(
                session.tenant,
                session.agent_id,
                delivery.tokens,
                is_challenged=delivery.is_challenged,
                takes_keys=not withdraws,
            )
        except ForeignAgentError as error:
            _MESSAGES.labels(outcome="foreign-agent").inc()
            _log.warning("another environment's agent", agent=session.agent_id, reason=str(error))
            return
        except Exception:  # noqa: BLE001 - logged whole
            # What would be a 500 over HTTP: no message ends the proxy.
            _MESSAGES.labels(outcome="internal").inc()
            _log.exception("a message of the broker failed unexpectedly")
            return
        _MESSAGES.labels(outcome="taken").inc()
        if delivery.is_challenged:
            body = {"receipts": [receipt.as_json() for receipt in receipts]}
            answer = self._sealed(delivery, session.challenge, body)
            if len(answer) <= self._answers.maxsize:
                self._answers[name] = answer
            await client.publish(subject, answer)

    async def _slow_down(self, tenant: str, agent_id: str, *, withdraws: bool) -> None:
        name = (tenant, agent_id, withdraws)
        if (bucket := self._buckets.get(name)) is None:
            if len(self._buckets) >= _MAX_AGENTS:
                self._buckets.clear()
            bucket = self._buckets[name] = TokenBucket(
                self._clock, rate_per_s=self._requests_per_s, burst=BURST_FACTOR * self._requests_per_s
            )
        while wait_s := bucket.take():
            await self._clock.sleep(wait_s)

    def _sealed(self, delivery: BrokeredDelivery, challenge: bytes, body: Mapping[str, object]) -> bytes:
        return seal_answer(
            json.dumps(body, separators=(",", ":")).encode(),
            challenge=challenge,
            message_id=delivery.message_id,
            agent=delivery.agent,
            proxy_id=self._receiver.proxy_id,
        )


async def _answered[T](client: Any, ask: Callable[[], Awaitable[T]]) -> T:
    """What the broker says (rule 7). TimeoutError, if it says nothing."""
    for _ in range(ASKED_TIMES - 1):
        try:
            return await ask()
        except TimeoutError:
            if not client.is_connected:
                raise
    return await ask()


def _names(errors: BaseExceptionGroup[BaseException]) -> str:
    return ", ".join(sorted({type(error).__name__ for error in errors.exceptions}))
