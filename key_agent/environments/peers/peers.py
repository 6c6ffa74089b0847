"""What an agent asks of the agents of other environments; each question typed, bounded and repeatable.

1. An environment is known by its name; where its agent answers and who it has to be stands in the signed
   rows. Only before there are any (`env join`) an administrator says it.
2. Whoever is told of a gap (`Ack.applied` is false) sends what is missing: no answer has to be guessed.
3. What goes to `wraps` and `notice` is other modules' to read; here it is bytes.
"""

from collections.abc import Callable
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from envelope.errors import IntegrityError, SealgateError
from key_agent.environments.peers.heartbeats import Heartbeat, Question
from key_agent.environments.peers.peer_transport import MIN_BYTES_PER_S, PeerAddress, PeerError, PeerTransport
from key_agent.environments.shared.documents import (
    Delta,
    EnvironmentBody,
    KekBody,
    SharedRow,
    decode_delta,
    encode_delta,
    read_registry_key,
)
from key_agent.environments.states import EnvironmentState

HEARTBEAT_PATH: Final = "/v1/env/heartbeat"
REGISTRY_PATH: Final = "/v1/env/registry"
FOREWORD_PATH: Final = "/v1/env/foreword"
DIGEST_PATH: Final = "/v1/env/registry/digest"
IDENTITY_PATH: Final = "/v1/env/identity"
JOIN_PATH: Final = "/v1/env/join"
WRAPS_PATH: Final = "/v1/env/wraps"
NOTICE_PATH: Final = "/v1/env/notice"
PER_ROW_S: Final = 0.002
"""More time for each row of a delta: the other agent checks its signature and stores it before it answers."""

_JOIN_DOMAIN: Final = b"sealgate/v1 join request\x00"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=63)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Text = Annotated[str, msgspec.Meta(max_length=16_384)]


class Ack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a registry stands after a delta was offered; *applied*: it has that delta now."""

    term: _Number
    epoch: _Number
    applied: bool


class Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of all shared rows, and how new they are."""

    term: _Number
    epoch: _Number
    digest: _Text


class Introduction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who an agent says it is. Its TLS certificate has proven tenant and agent; administrators compare the
    registry key's fingerprint.
    """

    tenant: _Name
    environment: _Name
    agent: _Name
    registry_key: _Text
    """base64url of the Ed25519 public key."""


class JoinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An environment that asks to be one of the set: what its row will say, signed with the registry key
    whose fingerprint the administrators compare.
    """

    introduction: Introduction
    url: _Text
    region: _Text = ""
    geo: _Text = ""
    load_balancer_name: _Text = ""
    address: _Text = ""
    kms_type: _Text = ""
    transport_certificate_pem: _Text
    kek_id: _Name
    kek: KekBody
    signature: Annotated[str, msgspec.Meta(max_length=128)] = ""

    def signed_by(self, key: Ed25519PrivateKey) -> "JoinRequest":
        return msgspec.structs.replace(self, signature=key.sign(self._signed_bytes()).hex())

    def check(self) -> None:
        """IntegrityError unless the key that it names has signed all of it."""
        try:
            key = read_registry_key(self.introduction.registry_key)
            key.verify(bytes.fromhex(self.signature), self._signed_bytes())
        except (InvalidSignature, ValueError, SealgateError):
            raise IntegrityError(
                "a request to join is not signed with the registry key that it names"
            ) from None

    def environment_body(self, state: EnvironmentState, *, now_ms: int) -> EnvironmentBody:
        """Its row, if it is one of the set from now on."""
        told = self.introduction
        return EnvironmentBody(
            name=told.environment,
            agent_id=told.agent,
            api_url=self.url,
            region=self.region,
            geo=self.geo,
            kms_type=self.kms_type,
            registry_key=told.registry_key,
            transport_certificate_pem=self.transport_certificate_pem,
            kek_id=self.kek_id,
            state=state,
            since_ms=now_ms,
            load_balancer_name=self.load_balancer_name,
            address=self.address,
        )

    def _signed_bytes(self) -> bytes:
        unsigned = msgspec.structs.replace(self, signature="")
        return _JOIN_DOMAIN + msgspec.json.encode(unsigned, order="sorted")


class JoinAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    is_added: bool
    """False: the manager's administrator has not said yes yet."""
    introduction: Introduction
    """The manager's own."""


class Peers:
    def __init__(
        self, transport: PeerTransport, *, address: Callable[[str], PeerAddress], timeout_s: float
    ) -> None:
        """*address*: where the agent of an environment is; PeerError if it is not known."""
        self._transport = transport
        self._address = address
        self._timeout_s = timeout_s

    async def heartbeat(self, environment: str, question: Question) -> Heartbeat:
        """Its answer, not checked yet. PeerError."""
        return await self._transport.call(
            self._address(environment), "POST", HEARTBEAT_PATH, question, Heartbeat, timeout_s=self._timeout_s
        )

    async def send_delta(self, environment: str, delta: Delta) -> Ack:
        """PeerError `stale_term`: it has seen a higher term than the delta's."""
        body = encode_delta(delta)
        content = await self.post(
            environment,
            REGISTRY_PATH,
            body,
            method="PUT",
            timeout_s=self._timeout_s + len(delta.rows) * PER_ROW_S + len(body) / MIN_BYTES_PER_S,
        )
        try:
            return msgspec.json.decode(content, type=Ack)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise PeerError("bad-answer", f"{environment}: no acknowledgement") from None

    async def forewarn(self, environment: str, row: SharedRow) -> None:
        """What it will be when the rows that follow are there (forewords.py). PeerError."""
        await self.post(environment, FOREWORD_PATH, msgspec.json.encode(row))

    async def since(self, environment: str, epoch: int, *, at_most_s: float | None = None) -> Delta:
        """What its registry has that is newer than *epoch*; 0: all of it. PeerError.

        It may take as long as it comes at a decent rate, but no longer than *at_most_s*.
        """
        content = await self._transport.request(
            self._address(environment),
            "GET",
            f"{REGISTRY_PATH}?after={epoch}",
            timeout_s=self._timeout_s,
            at_most_s=at_most_s,
        )
        try:
            return decode_delta(content)
        except SealgateError as error:
            raise PeerError("bad-answer", f"{environment}: {error}") from None

    async def introduction(self, peer: PeerAddress) -> Introduction:
        """Who is there. PeerError."""
        return await self._transport.call(
            peer, "GET", IDENTITY_PATH, None, Introduction, timeout_s=self._timeout_s
        )

    async def ask_to_join(self, peer: PeerAddress, request: JoinRequest) -> JoinAnswer:
        """PeerError."""
        return await self._transport.call(
            peer, "POST", JOIN_PATH, request, JoinAnswer, timeout_s=self._timeout_s
        )

    async def post(
        self,
        environment: str,
        path: str,
        body: bytes,
        *,
        method: str = "POST",
        timeout_s: float | None = None,
    ) -> bytes:
        """PeerError."""
        return await self._transport.request(
            self._address(environment), method, path, body, timeout_s=timeout_s or self._timeout_s
        )
