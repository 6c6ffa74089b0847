"""How far a resumable upload was sealed, and what of it is held: the state between two of its requests.

1. The content that one request brings becomes one part of a composite (docs/format.md 3.5). The service is
   given the stored bytes of all parts, one behind the other, in granules of 256 KiB; what does not fill one
   is *carried*, as ciphertext.
2. A part's salt is made of its content (docs/format.md 2.4). Who sends the same again gives the same bytes;
   another content never shares a nonce with it, whatever is remembered here, forgotten, or rolled back.
3. What is about to leave is *claimed* before: the service may have a piece of it from then on, so that
   nothing else can follow. Other content at a place that is claimed ends the upload.
4. What of the plaintext has to be known (its checksum so far, the digests it is to have) is sealed here.
"""

from typing import Final

import msgspec

from envelope.errors import SealgateError
from envelope.multipart import Manifest, Part
from envelope.objects import Bind, Header, Opener, Sealer
from proxy import refusals
from proxy.keys.data_key import DataKey
from proxy.profiles.gcs.digests import Digests
from proxy.refusals import RefusedError

GRANULE_BYTES: Final = 256 * 1024
"""Of stored bytes at the service, and of the client's content here."""
MAX_PARTS: Final = 9_999
_NAME: Final = b"gcs upload session "


class Known(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Of the plaintext: the CRC-32C of what was sealed, and what its client says of the whole."""

    crc32c: bytes = bytes(4)
    said_crc32c: bytes | None = None
    said_md5: bytes | None = None

    @property
    def said(self) -> Digests:
        return Digests(crc32c=self.said_crc32c, md5=self.said_md5)

    def sealed(self, key: DataKey, ref: bytes) -> bytes:
        sealer = Sealer(key.object_key, key.owner, key.key_id, bind=Bind.NAME, name=_NAME + ref)
        return bytes(sealer.update(msgspec.msgpack.encode(self))) + sealer.finalize()

    @classmethod
    def opened(cls, data: bytes, key: DataKey, ref: bytes) -> "Known":
        """*key*: the one that *data* names. RefusedError(UPLOAD_LOST) for what was not sealed for it."""
        opener = Opener(key.owner, lambda _header: key.object_key, bind=Bind.NAME, name=_NAME + ref)
        try:
            plain = bytes(opener.update(data)) + opener.finalize()
            return msgspec.msgpack.decode(plain, type=cls)
        except (SealgateError, msgspec.MsgspecError) as error:
            raise RefusedError(refusals.UPLOAD_LOST) from error


class Claim(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A part that is about to leave, or may have left: with it, content up to `stop` is sealed."""

    commitment: bytes
    stop: int
    is_last: bool
    secrets: bytes
    """`Known` of the content up to there."""


class State(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Of an upload: content up to `plain_bytes` is sealed, as `parts`; of their stored bytes `sent_bytes` are
    in the service's hands, and `carry` is what follows there."""

    ref: bytes
    """The composite's upload reference: 16 random bytes, which nobody else's salts are made of."""
    secrets: bytes
    parts: tuple[tuple[int, bytes], ...] = ()
    """Stored length and commitment of each."""
    carry: bytes = b""
    total_bytes: int | None = None
    """Of the content; None: its client has not said yet."""
    plain_bytes: int = 0
    sent_bytes: int = 0
    claim: Claim | None = None
    is_done: bool = False

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "State":
        """RefusedError(UPLOAD_LOST) for what an older or a newer proxy has written."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as error:
            raise RefusedError(refusals.UPLOAD_LOST) from error

    @property
    def next_number(self) -> int:
        """Of the part that follows. RefusedError(TOO_MANY_CHUNKS)."""
        if len(self.parts) >= MAX_PARTS:
            raise RefusedError(refusals.TOO_MANY_CHUNKS)
        return len(self.parts) + 1

    def allows(self, claim: Claim) -> bool:
        """Whether no other part may be there already, or a piece of one."""
        return self.claim is None or self.claim.commitment == claim.commitment

    def with_part(self, part: Part) -> tuple[tuple[int, bytes], ...]:
        return (*self.parts, (part.stored_bytes, part.commitment))

    def manifest_with(self, part: Part) -> Manifest:
        """Of the composite that ends with *part*."""
        listed = enumerate(self.with_part(part), 1)
        return Manifest(self.ref, tuple(Part(number, stored, mark) for number, (stored, mark) in listed))

    def advanced(self, part: Part, *, carry: bytes, sent_bytes: int) -> "State":
        """When the claimed *part* is with the service, or carried."""
        claim = self.claim
        if claim is None or claim.commitment != part.commitment:
            raise RefusedError(refusals.INTERNAL)
        return State(
            ref=self.ref,
            secrets=claim.secrets,
            parts=self.with_part(part),
            carry=carry,
            total_bytes=self.total_bytes,
            plain_bytes=claim.stop,
            sent_bytes=sent_bytes,
        )

    def finished(self) -> "State":
        """When the service has made an object of what was claimed: what a client may still ask for."""
        claim = self.claim
        if claim is None or not claim.is_last:
            raise RefusedError(refusals.INTERNAL)
        return State(
            ref=self.ref,
            secrets=claim.secrets,
            total_bytes=claim.stop,
            plain_bytes=claim.stop,
            is_done=True,
        )


def key_header(sealed: bytes) -> Header:
    """Which key *sealed* names. RefusedError(UPLOAD_LOST) for what is not sealed."""
    try:
        return Header.parse(sealed)
    except SealgateError as error:
        raise RefusedError(refusals.UPLOAD_LOST) from error
