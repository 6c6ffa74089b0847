"""One request to S3, as its plan is made: who asks, what for, and what the service may be sent.

1. Requests of our own go with what the client may and nothing of what it asks: `asking_edits` leaves of its
   `x-amz-*` fields only those that say who pays, whose bucket it is, and with which key it is encrypted.
2. Their targets are the client's path, byte for byte, with a query of ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

from proxy.asking import ServiceAnswer, Signer
from proxy.messages.message import ExpectedDigest, Fields
from proxy.plans.conversing import Reply
from proxy.plans.plan import Decoder
from proxy.plans.request import Edits, Request
from proxy.profiles.s3 import etags
from proxy.profiles.s3.addressing import Address
from proxy.profiles.s3.multipart import PartRules
from proxy.profiles.s3.routes import Operation

MAX_DOCUMENT_BYTES: Final = 1024 * 1024
"""Of an answer that is no content: a list of 1,000 parts, an error."""

_KEPT: Final = frozenset(
    {
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-expected-bucket-owner",
        "x-amz-request-payer",
        "x-amz-security-token",
        "x-amz-server-side-encryption-customer-algorithm",
        "x-amz-server-side-encryption-customer-key",
        "x-amz-server-side-encryption-customer-key-md5",
    }
)
_OF_THE_OBJECT: Final = frozenset(
    {"cache-control", "content-disposition", "content-encoding", "content-language", "expires"}
)
# Of the connection between the service and us, or of a body that we make anew.
_NOT_THE_CLIENTS: Final = frozenset(
    {"connection", "content-length", "content-md5", "keep-alive", "trailer", "transfer-encoding", "alt-svc"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """The body of a request that is content, before it is sealed."""

    plain_bytes: int | None
    digests: tuple[ExpectedDigest, ...] = ()
    decoder: Callable[[], Decoder] | None = None
    sent_bytes: int | None = None
    """As it comes, framing included; None: it is not said."""
    sums: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """When it has come: the checksums that its request named, by algorithm; they were compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """`edits`: those that this request, going on as it is, needs; the body's length is not among them."""

    request: Request
    operation: Operation
    address: Address
    parameters: Mapping[str, str]
    edits: Edits
    sign: Signer | None
    rules: PartRules
    content: Content | None = None
    read: Callable[[bytes], bytes] = bytes
    """A collected document as it was meant: decoded, its digests verified. RefusedError."""

    @property
    def fields(self) -> Fields:
        return self.request.head.fields

    @property
    def path(self) -> str:
        return self.request.head.target.partition("?")[0]

    def target(self, **query: str | int) -> str:
        """The client's path with a query of ours; `_` in a name stands for nothing, a value may be empty."""
        pairs = [
            f"{name}={quote(str(value), safe='-_.~')}" if value != "" else name
            for name, value in query.items()
        ]
        return f"{self.path}?{'&'.join(pairs)}" if pairs else self.path

    def asking_edits(self) -> Edits:
        """For plans that converse: what of the client's fields goes with requests of ours."""
        dropped = {name for name in self.fields if name.startswith("x-amz-") and name not in _KEPT}
        return self.edits.also(drop=dropped | _OF_THE_OBJECT)


def reply_of(answer: ServiceAnswer, body: bytes = b"", *, status: int | None = None) -> Reply:
    """The service's answer as our own, ETag as clients are shown it, digests of ciphertext left out."""
    fields: list[tuple[str, str]] = []
    for name in answer.fields:
        if name in _NOT_THE_CLIENTS or name.startswith("x-amz-checksum-"):
            continue
        values = answer.fields.all(name)
        fields.extend((name, etags.to_client(value) if name == "etag" else value) for value in values)
    return Reply(status=answer.status if status is None else status, fields=tuple(fields), body=body)


async def reply_with_body(answer: ServiceAnswer) -> Reply:
    """The same with the service's own document, an error's above all."""
    return reply_of(answer, await answer.read(MAX_DOCUMENT_BYTES))
