"""Which question of a peer is answered by what: the table of routes, and of refusals.

1. Any agent of the tenant may ask who is here, ask to join, and read the shared rows: they are signed and
   hold no secret. The companions of load balancers may read them as well, and nothing else.
2. To stand, to bring and to warn is for members; and for the manager that this environment asked to be added
   by, while it waits.
3. An environment warns of itself alone.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from envelope.certificates import Role
from envelope.errors import FormatError, IntegrityError, SealgateError
from key_agent import metrics
from key_agent.environments.peers.heartbeats import Question
from key_agent.environments.peers.membership import Membership
from key_agent.environments.peers.own_word import Notice
from key_agent.environments.peers.peer_api import PeerCall, PeerRoute, Refusal
from key_agent.environments.peers.peering import Peering
from key_agent.environments.peers.peers import (
    DIGEST_PATH,
    FOREWORD_PATH,
    HEARTBEAT_PATH,
    IDENTITY_PATH,
    JOIN_PATH,
    NOTICE_PATH,
    REGISTRY_PATH,
    Digest,
    JoinRequest,
)
from key_agent.environments.shared.documents import MAX_DELTA_BYTES, SharedRow, decode_delta, encode_delta
from key_agent.environments.shared.shared_errors import EpochGapError, RegistryTamperedError, StaleTermError
from key_agent.errors import KeySourceError
from key_agent.registry.database import RegistryError
from key_agent.registry.store import RefusedChangeError

_SMALL_BYTES: Final = 64 << 10
READERS: Final = frozenset({Role.AGENT_TLS, Role.BALANCER})

REFUSALS: Final[Mapping[type[SealgateError], Refusal]] = {
    StaleTermError: (409, "stale_term", "A newer manager writes: ask it for what has changed."),
    EpochGapError: (409, "epoch_gap", "Send what is missing before."),
    RegistryTamperedError: (503, "registry_tampered", "This environment heals; try again later."),
    IntegrityError: (403, "not_believed", "See the reason."),
    FormatError: (400, "bad-request", "Mend the request."),
    RegistryError: (503, "registry", "Try again later."),
    RefusedChangeError: (409, "refused", "See the reason."),
    KeySourceError: (503, "key_source", "The HSM there does not answer, or its KEK is revoked."),
}


class PeerRoutes:
    def __init__(self, peering: Peering, membership: Membership) -> None:
        self._peering = peering
        self._membership = membership

    def is_member(self, agent_id: str) -> bool:
        """Rule 2."""
        if self._peering.environment_of(agent_id) is not None:
            return True
        joining = self._membership.joining
        return joining is not None and joining.manager_agent == agent_id

    def table(self) -> Sequence[PeerRoute]:
        return (
            PeerRoute("POST", HEARTBEAT_PATH, self._heartbeat, limit_bytes=_SMALL_BYTES),
            PeerRoute("PUT", REGISTRY_PATH, self._offer, limit_bytes=MAX_DELTA_BYTES),
            PeerRoute("POST", FOREWORD_PATH, self._foreword, limit_bytes=_SMALL_BYTES),
            PeerRoute("GET", REGISTRY_PATH, self._since, members_only=False, roles=READERS, limit_bytes=0),
            PeerRoute("GET", DIGEST_PATH, self._digest, members_only=False, roles=READERS, limit_bytes=0),
            PeerRoute("GET", IDENTITY_PATH, self._identity, members_only=False, roles=READERS, limit_bytes=0),
            PeerRoute("POST", JOIN_PATH, self._join, members_only=False, limit_bytes=_SMALL_BYTES),
            PeerRoute("POST", NOTICE_PATH, self._notice, limit_bytes=_SMALL_BYTES),
        )

    async def _heartbeat(self, call: PeerCall) -> bytes:
        return msgspec.json.encode(self._peering.answer(_read(call, Question)))

    async def _offer(self, call: PeerCall) -> bytes:
        try:
            return msgspec.json.encode(
                await self._peering.rows.offered(decode_delta(call.body), call.agent_id)
            )
        except StaleTermError:
            metrics.FENCING_REJECTS.inc()
            raise

    async def _foreword(self, call: PeerCall) -> bytes:
        await self._peering.forewarned(_read(call, SharedRow))
        return b"{}"

    async def _since(self, call: PeerCall) -> bytes:
        text = call.query.get("after", "0")
        if not text.isascii() or not text.isdigit() or len(text) > 19:
            raise FormatError("after: not an epoch")
        return encode_delta(await self._peering.shared.since(int(text)))

    async def _digest(self, _call: PeerCall) -> bytes:
        view = self._peering.view
        return msgspec.json.encode(Digest(view.term, view.epoch, view.digest))

    async def _identity(self, _call: PeerCall) -> bytes:
        return msgspec.json.encode(self._membership.introduction)

    async def _join(self, call: PeerCall) -> bytes:
        return msgspec.json.encode(self._membership.asked(call.agent_id, _read(call, JoinRequest)))

    async def _notice(self, call: PeerCall) -> bytes:
        notice = _read(call, Notice)
        if self._peering.environment_of(call.agent_id) != notice.environment:
            raise IntegrityError(f"{call.agent_id} is not the agent of {notice.environment}")
        await self._peering.noticed(notice)
        return b"{}"


def _read[T](call: PeerCall, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(call.body, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FormatError(str(error)[:200]) from None
