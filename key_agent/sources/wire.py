"""What the agent and its HSM worker say to each other.

1. A frame is a 4-byte big-endian length and a msgpack message; one longer than FRAME_LIMIT ends it all.
2. Messages are typed structs. No pickle: the side with the vendor's library is the less trusted one.
3. A reply carries its request's number: an answer to an earlier question is never taken for this one's.
4. The only secret on the wire is the HSM's PIN, in the first frame. KM is in no message type: only wrapped
   keys, parcels and envelopes are.
"""

from typing import Any, BinaryIO, Final, override

import msgspec

from envelope.errors import SealgateError
from envelope.keys import KeyId, NetworkService
from key_agent.sources.source import (
    Arrival,
    Destination,
    EnvelopeRequest,
    Kek,
    KekReference,
    NewKey,
    Parcel,
    WrapMethod,
    WrappedKey,
)
from key_agent.sources.vendors import Quirks
from key_agent.sources.verdict import Verdict

LENGTH_SIZE: Final = 4
FRAME_LIMIT: Final = 64 * 1024 * 1024


class ProtocolError(Exception):
    """The other side does not speak this protocol (any more)."""


class Message(msgspec.Struct, kw_only=True, tag=True):
    """Anything that travels in a frame."""


class Hello(Message, tag="hello"):
    """The first frame: load the module. Everything else follows."""

    module_path: str
    module_arguments: str
    token_label: str
    token_serial: str | None
    pin: str
    agent_id: str
    signing_key_file: str | None
    signing_certificate_file: str | None
    quirks: Quirks = msgspec.field(default_factory=Quirks)

    @override
    def __repr__(self) -> str:
        return f"Hello(module_path={self.module_path!r}, token_label={self.token_label!r}, pin=...)"


class OpenBaoHello(Message, tag="hello-openbao"):
    """The first frame to the worker of a key server; its secrets stand in files that it reads itself."""

    url: str
    mount: str
    namespace: str | None
    token_file: str
    ca_file: str | None
    certificate_file: str | None
    key_file: str | None
    timeout_s: float
    agent_id: str
    signing_key_file: str | None
    signing_certificate_file: str | None


class KmipHello(Message, tag="hello-kmip"):
    host: str
    port: int
    ca_file: str
    certificate_file: str
    key_file: str
    timeout_s: float
    agent_id: str
    signing_key_file: str | None
    signing_certificate_file: str | None


Greeting = Hello | OpenBaoHello | KmipHello


class CreateKek(Message, tag="create-kek"):
    reference: KekReference
    methods: tuple[WrapMethod, ...]
    """Candidates, best first."""
    replace_unfinished: bool
    now_ms: int
    valid_until_s: int | None = None


class AdoptKek(Message, tag="adopt-kek"):
    reference: KekReference
    methods: tuple[WrapMethod, ...]
    is_method_pinned: bool
    """The operator or the vendor's file names the method: it is not tried on a throw-away key first."""
    now_ms: int
    valid_from_s: int | None = None
    valid_until_s: int | None = None


class DestroyKek(Message, tag="destroy-kek"):
    kek: Kek


class EnableKek(Message, tag="enable-kek"):
    kek: Kek
    enabled: bool


class Generate(Message, tag="generate"):
    kek: Kek
    wanted: tuple[NewKey, ...]
    now_ms: int
    budget_s: float
    """Stop after so long and answer for the first ones (at least one): the KEK watch wants its turn."""


class Rewrap(Message, tag="rewrap"):
    old: Kek
    new: Kek
    keys: tuple[WrappedKey, ...]
    now_ms: int
    budget_s: float


class ExportKeys(Message, tag="export"):
    kek: Kek
    keys: tuple[WrappedKey, ...]
    destinations: tuple[Destination, ...]
    now_s: float
    budget_s: float


class ImportKeys(Message, tag="import"):
    kek: Kek
    arrivals: tuple[Arrival, ...]
    transport_key_file: str
    now_ms: int
    budget_s: float


class SealEnvelopes(Message, tag="seal"):
    kek: Kek
    requests: tuple[EnvelopeRequest, ...]
    budget_s: float


class Diagnose(Message, tag="diagnose"):
    kek: Kek
    now_s: float


class Describe(Message, tag="describe"):
    methods: tuple[WrapMethod, ...]


Request = (
    Hello
    | OpenBaoHello
    | KmipHello
    | CreateKek
    | AdoptKek
    | DestroyKek
    | EnableKek
    | Generate
    | Rewrap
    | ExportKeys
    | ImportKeys
    | SealEnvelopes
    | Diagnose
    | Describe
)


class Done(Message, tag="done"):
    pass


class Failed(Message, tag="failed"):
    verdict: Verdict
    detail: str
    retry_after_s: float = 0.0


class KekMade(Message, tag="kek-made"):
    kek: Kek


class Generated(Message, tag="generated"):
    keys: tuple[WrappedKey, ...]


class ExportDone(Message, tag="exported"):
    """For the first keys of the request, as many as fitted: each has a parcel for every destination, or
    failed."""

    parcels: tuple[Parcel, ...]
    failed_keys: tuple[tuple[KeyId, str], ...]


class RewrapDone(Message, tag="rewrapped"):
    """For the first keys of the request, as many as fitted: each is in one of the two."""

    keys: tuple[WrappedKey, ...]
    failed_keys: tuple[tuple[KeyId, str], ...]


class SealedEnvelopes(msgspec.Struct, frozen=True, kw_only=True):
    """One `EnvelopeResult`, as pairs: msgpack maps with structured keys are nobody's friend."""

    owner: NetworkService
    tokens: tuple[tuple[str, str], ...]
    failed_keys: tuple[tuple[KeyId, str], ...]
    failed_recipients: tuple[tuple[str, str], ...]


class Sealed(Message, tag="sealed"):
    results: tuple[SealedEnvelopes, ...]


class Diagnosed(Message, tag="diagnosed"):
    verdict: Verdict
    detail: str
    retry_after_s: float = 0.0


class Described(Message, tag="described"):
    facts: dict[str, Any]


Reply = Done | Failed | KekMade | Generated | RewrapDone | ExportDone | Sealed | Diagnosed | Described


class Numbered[T](msgspec.Struct, frozen=True):
    number: int
    message: T


_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Numbered[Request])
_replies = msgspec.msgpack.Decoder(Numbered[Reply])


def encode(number: int, message: Message) -> bytearray:
    """The frame, length included."""
    frame = bytearray(LENGTH_SIZE)
    _encoder.encode_into(Numbered(number, message), frame, LENGTH_SIZE)
    size = len(frame) - LENGTH_SIZE
    if size > FRAME_LIMIT:
        raise ProtocolError(f"a message of {size} bytes is longer than a frame may be")
    frame[:LENGTH_SIZE] = size.to_bytes(LENGTH_SIZE)
    return frame


def frame_size(prefix: bytes) -> int:
    """Bytes that follow the 4-byte *prefix*. ProtocolError if that is longer than a frame may be."""
    size = int.from_bytes(prefix)
    if size > FRAME_LIMIT:
        raise ProtocolError(f"a frame of {size} bytes was announced")
    return size


def decode_request(body: bytes) -> Numbered[Request]:
    try:
        return _requests.decode(body)
    except (msgspec.DecodeError, ValueError, SealgateError) as error:
        raise ProtocolError(f"not a request: {error}") from None


def decode_reply(body: bytes) -> Numbered[Reply]:
    try:
        return _replies.decode(body)
    except (msgspec.DecodeError, ValueError, SealgateError) as error:
        raise ProtocolError(f"not a reply: {error}") from None


def read_request(stream: BinaryIO) -> Numbered[Request] | None:
    """The next request, blocking; None at a clean end of the stream."""
    prefix = stream.read(LENGTH_SIZE)
    if not prefix:
        return None
    if len(prefix) < LENGTH_SIZE:
        raise ProtocolError("the stream ended inside a frame")
    size = frame_size(prefix)
    body = stream.read(size)
    if len(body) < size:
        raise ProtocolError("the stream ended inside a frame")
    return decode_request(body)
