"""What is known of one flow between its hooks, and what exchanges are carried out with.

The plan of an answer follows from the plan by which its request went on: both meet here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from mitmproxy.http import HTTPFlow

from envelope.errors import KeyUnavailableError
from envelope.keys import NetworkService
from proxy import refusals
from proxy.asking import Source
from proxy.bodies.bodies import ReshapeBody, SealBody, refusal_for
from proxy.bodies.collecting import Collecting, CountedBody
from proxy.bodies.opening import OpenBody, OpenRangeBody
from proxy.bodies.prefetch import Prefetch
from proxy.bodies.reading import Read, Reading
from proxy.bodies.resealing import SealOrPassBody
from proxy.bodies.spool import Spools
from proxy.exchange.conversation import ServiceConversation
from proxy.gate.permit import Collect
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from proxy.messages.message import AnswerHead
from proxy.plans.answer_plan import MapWhole
from proxy.plans.plan import Going, RequestPlan
from proxy.plans.request import Request
from proxy.profiles.profile import Profile
from proxy.recording import Trail
from proxy.refusals import Refusal
from proxy.uploads import UploadStore

type ClientBody = SealBody | SealOrPassBody | ReshapeBody | OpenBody | OpenRangeBody
"""What holds a key while it runs."""

EXCHANGE: Final = "sealgate.exchange"
"""Where it hangs on its flow (`metadata`)."""


@dataclass(slots=True, eq=False)
class Exchange:
    """What is known of one flow between its hooks."""

    request: Request
    profile: Profile
    plan: RequestPlan
    trail: Trail
    source: Source
    read: Read | None = None
    key: DataKey | None = None
    is_answered_here: bool = False
    restarts: bool = False
    """A range is read again: the object changed after it was looked at."""
    whole: MapWhole | None = None
    """What is to become of the answer, once it has been collected."""
    answer: AnswerHead | None = None
    came: tuple[tuple[bytes, bytes], ...] = ()
    """The header fields as they came (Host is ours by then)."""
    conversation: ServiceConversation | None = None
    collected: list[CountedBody] = field(default_factory=list)

    def let_go(self) -> None:
        """The flow is over: what was collected does not count any more."""
        for body in self.collected:
            body.let_go()

    @property
    def owner(self) -> NetworkService:
        return self.request.service.owner

    def begin_read(self) -> Read:
        """What is known of reading its object; begun at the first call."""
        if self.read is None:
            self.read = Read(
                route=self.request.route,
                trail=self.trail,
                source=self.source,
                composites=self.profile.makes_composites,
            )
        return self.read

    @property
    def key_in_use(self) -> DataKey | None:
        return self.key or (self.read.key if self.read is not None else None)


def exchange_of(flow: HTTPFlow) -> Exchange | None:
    exchange = flow.metadata.get(EXCHANGE)
    return exchange if isinstance(exchange, Exchange) else None


def source_of(request: Request, plan: RequestPlan, fields: Iterable[tuple[bytes, bytes]]) -> Source:
    """As whom to ask about the object of this request: the client's *fields*, but for those dropped."""
    if not isinstance(plan, Going):
        return Source(service=request.service, target=request.head.target, fields=tuple(fields))
    return Source(
        service=request.service,
        target=plan.target or request.head.target,
        fields=tuple(fields),
        dropped=plan.edits.drop,
        sign=plan.sign,
    )


def ended(body: ClientBody) -> Refusal | None:
    """Why a body under way has to end though nothing moves it; None: it has not to."""
    if body.finished or body.failure is not None or body.key is None:
        return None
    try:
        body.key.check()
    except KeyUnavailableError as error:
        return refusal_for(error)
    return None


class Means:
    """What exchanges are carried out with. *wait_s*: how long an upload waits for a key that is late."""

    def __init__(
        self,
        keys: KeyCache,
        prefetch: Prefetch,
        *,
        uploads: UploadStore | None,
        wait_s: float,
        spools: Spools | None = None,
        collecting: Collecting | None = None,
    ) -> None:
        self.keys = keys
        self.prefetch = prefetch
        self.reading = Reading(keys, prefetch)
        self.spools = spools or Spools()
        self.wait_s = wait_s
        self._uploads = uploads
        self._collecting = collecting or Collecting()

    def collect(
        self, exchange: Exchange, limit_bytes: int, *, too_large: Refusal = refusals.TOO_LARGE
    ) -> Collect:
        """A body of it is to be collected; it counts until the exchange is over."""
        body = self._collecting.collect(exchange.owner.tenant, limit_bytes, too_large=too_large)
        exchange.collected.append(body)
        return body

    def conversation(self, exchange: Exchange, collected: Collect | None) -> ServiceConversation:
        """The one conversation of *exchange*; it begins with what was *collected*."""
        if exchange.conversation is not None:
            return exchange.conversation
        exchange.conversation = talk = ServiceConversation(
            exchange.request,
            exchange.trail,
            exchange.source,
            keys=self.keys,
            prefetch=self.prefetch,
            reading=self.reading,
            composites=exchange.profile.makes_composites,
            wait_s=self.wait_s,
            uploads=self._uploads,
            body=collected.body() if collected is not None else b"",
        )
        return talk
