"""What a profile's handler may do while its client waits: the interface that conversation.py implements.

A handler asks the service, seals and opens under the key of its request, and is told what came of it; it
decides by a plan (plan.py). It sees no key and no socket.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from envelope.multipart import Manifest
from envelope.objects import Header
from proxy.asking import ServiceAnswer
from proxy.keys.data_key import DataKey
from proxy.messages.message import ByteRange, Fields
from proxy.plans.request import Request
from proxy.uploads import UploadStore


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOf:
    """Which part of which upload a message is (envelope/multipart.py)."""

    upload_ref: bytes
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What an upload became, once its end has gone up."""

    plain_bytes: int
    stored_bytes: int
    commitment: bytes
    key_id: bytes
    digests: dict[str, bytes]
    """Of the plaintext, of the algorithms that `Seal.record_digests` names."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A stored object, or a range of it, being read as plaintext. What `pieces` raises ends the read."""

    plain_bytes: int
    """Of what is read; proven, not claimed."""
    object_bytes: int
    """Of the whole object."""
    etag: str | None
    fields: Fields
    """Of the service's answer."""
    pieces: AsyncIterator[bytes]


class StoredKind(Enum):
    """What a stored object is, by its first bytes."""

    OTHER = "other"  # none of ours
    SIMPLE = "simple"
    COMPOSITE = "composite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What could be told of a stored object without reading it."""

    kind: StoredKind
    stored_bytes: int
    plain_bytes: int
    etag: str | None
    manifest: Manifest | None
    """Of a composite."""


class Sealing(Protocol):
    """Plaintext on its way to become one message: iterate it once, then ask what it became."""

    @property
    def stored_bytes(self) -> int:
        """Known before, from the plaintext's length."""

    @property
    def sealed(self) -> Sealed:
        """RefusedError(INTERNAL) before the end."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class Spooled(Protocol):
    """An upload that was sealed and is held here, as often as the handler wants to send it."""

    @property
    def stored_bytes(self) -> int: ...

    @property
    def sealed(self) -> Sealed | None:
        """None: it was reshaped."""

    def read(self, start: int, stop: int) -> bytes:
        """Of the ciphertext; small pieces only: it may lie on a disk."""

    def pieces(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The ciphertext, or a part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer made here. Content-Length is added; Date is not."""

    status: int
    fields: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class Conversation(ABC):
    """What a profile's handler may do while its client waits (proxy/exchange/conversation.py)."""

    request: Request
    body: bytes
    """What the client has sent, if it was to be collected."""
    spooled: Spooled | None
    """Of `Converse.spool`."""

    @property
    @abstractmethod
    def uploads(self) -> UploadStore:
        """What is remembered of uploads in parts. RefusedError(UPLOADS_UNAVAILABLE) where there is none."""

    @abstractmethod
    def ask(
        self,
        method: str,
        target: str | None = None,
        *,
        fields: Iterable[tuple[str, str]] = (),
        keep: Iterable[str] = (),
        body: bytes | AsyncIterator[bytes] | None = None,
        body_bytes: int | None = None,
    ) -> AbstractAsyncContextManager[ServiceAnswer]:
        """Ask the service as the client (`Asking.ask`). RefusedError(UPSTREAM) where it cannot be asked."""

    @abstractmethod
    async def relay(
        self, answer: ServiceAnswer, *, limit_bytes: int = 1024 * 1024, to_upload: bool = False
    ) -> Reply:
        """The service's answer as the client may see it: to what was asked in place of its own request.

        *to_upload*: a redirect that would have the client send its content again elsewhere is refused.
        RefusedError(SERVICE_ANSWER) if it is longer.
        """

    @abstractmethod
    async def sealing_key(self, *, size_bytes: int | None = None, target: str | None = None) -> DataKey:
        """The active key, its use recorded. RefusedError, AuditUnavailableError."""

    @abstractmethod
    def opening_key(self, header: Header) -> DataKey:
        """The key that *header* names, its use recorded. KeyUnavailableError, AuditUnavailableError."""

    @abstractmethod
    async def sealing(
        self,
        pieces: AsyncIterator[bytes],
        plain_bytes: int,
        *,
        part: PartOf | None = None,
        record_digests: tuple[str, ...] = (),
        target: str | None = None,
    ) -> Sealing:
        """One message of *plain_bytes* that come as *pieces*. *target*: of the object, for the audit log."""

    @abstractmethod
    async def ending(self, manifest: Manifest) -> bytes:
        """Manifest message and trailer of a composite: what is stored behind its parts."""

    @abstractmethod
    def opened(
        self,
        target: str | None = None,
        *,
        wanted: ByteRange | None = None,
        fields: Iterable[tuple[str, str]] = (),
    ) -> AbstractAsyncContextManager[Opened]:
        """The object at *target* (None: the client's), or a range of it, opened.

        *fields* go with the read of the content: conditions, say. RefusedError: RangeRefusal, what a GET of
        it would be refused with, UPSTREAM_CHANGED, SERVICE_ANSWER if nothing comes that could be opened.
        """

    @abstractmethod
    async def inspect(self, target: str | None = None) -> Inspected | None:
        """What lies at *target* (None: the client's); None: the service does not say. Its key is asked for.

        RefusedError as a GET of it would be refused.
        """

    @abstractmethod
    async def composite_bytes(self, target: str, *, etag: str | None, stored_bytes: int) -> int | None:
        """Plaintext length of the object at *target*, which may be a composite: then its manifest is read,
        once per version. None: that cannot be told."""

    @abstractmethod
    def note(self, action: str, *, target: str | None = None, size_bytes: int | None = None) -> None:
        """An event of this request in the audit log. AuditUnavailableError: it must not happen."""
