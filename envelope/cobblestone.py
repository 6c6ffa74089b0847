"""Cobblestone-256 messages: C2SP chunked-encryption with AES-256-GCM and SHA-512 (docs/format.md 2.2).

    message = salt (24) ‖ commitment (32) ‖ chunk 0 ‖ chunk 1 ...

1. A full chunk is never the last one; the last is always shorter, if need be empty. So whole records are
   sealed and opened as they come, and a cut on a record boundary is noticed.
2. The commitment is compared, in constant time, before any chunk is opened.
3. No salt is ever taken from a caller: a salt used twice under one key gives two messages the same nonces.
   It is drawn at random, or made of key, context and the content's digest: then the same content gives the
   same message, and another content another salt, whatever its caller has forgotten or mixed up.
4. Nothing leaves an opener before its tag was verified. `decrypt_into` leaves unverified plaintext in its
   target when it raises, so that target is overwritten and dropped.
5. What has failed stays failed, `finalize` included, and forgets its keys.
6. One output buffer per `update`, filled in place: no joins, no work that grows with the square of the
   length. The shape (`update`, `finalize`) is that of `cryptography.cobblestone`, which can take over later.
"""

import hashlib
import hmac
import os
from abc import ABC, abstractmethod
from collections.abc import Buffer, Sequence
from dataclasses import dataclass, field
from typing import Final, Never, override

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from envelope.errors import FormatError, IntegrityError, MisuseError, SealgateError, TruncatedError

KEY_SIZE: Final = 32
SALT_SIZE: Final = 24
COMMITMENT_SIZE: Final = 32
HEAD_SIZE: Final = SALT_SIZE + COMMITMENT_SIZE
CHUNK_SIZE: Final = 16384
TAG_SIZE: Final = 16
RECORD_SIZE: Final = CHUNK_SIZE + TAG_SIZE
CHUNK_LIMIT: Final = 2**38
"""Chunk numbers are below this, so a message has at most 2^52 - 1 bytes."""

DIGEST_SIZE: Final = 32
_LABEL: Final = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00"
_SYNTHETIC_LABEL: Final = b"sealgate/v1 synthetic salt" + b"\x00"
_INVALID: Final = "damaged, incomplete, or sealed for someone else"
"""The one message of every authentication failure: which check failed is nobody's business (threat 17)."""


def invalid() -> IntegrityError:
    """The error of every failed authentication; callers must not add to it."""
    return IntegrityError(_INVALID)


def truncated() -> TruncatedError:
    """The end is missing, as the length alone shows."""
    return TruncatedError(_INVALID)


@dataclass(frozen=True, slots=True, eq=False)
class MessageKeys:
    """What one message is sealed with, derived from key, salt and context."""

    aead: AESGCM = field(repr=False)
    base_nonce: int = field(repr=False)
    commitment: bytes


def derive_message_keys(key: Buffer, salt: bytes, context: bytes) -> MessageKeys:
    """Step 1 and 2 of docs/format.md 2.2. MisuseError for a key that is not 32 bytes or was wiped."""
    okm = HKDFExpand(SHA512(), 76, _LABEL + salt + context).derive(_usable(key))
    return MessageKeys(AESGCM(okm[:32]), int.from_bytes(okm[32:44]), okm[44:76])


def _usable(key: Buffer) -> memoryview:
    view = memoryview(key)
    if view.nbytes != KEY_SIZE:
        raise MisuseError(f"a message key has {KEY_SIZE} bytes, not {view.nbytes}")
    if not any(view):
        raise MisuseError("the message key is all zero: it was wiped")
    return view


def unlock(keys: Sequence[Buffer], context: bytes, head: Buffer) -> MessageKeys:
    """The message keys of the one candidate that *head* (salt ‖ commitment) commits to.

    Every candidate is compared, in constant time, whichever matches. IntegrityError if none does.
    """
    return unlock_any([(key, context) for key in keys], head)[1]


def unlock_any(candidates: Sequence[tuple[Buffer, bytes]], head: Buffer) -> tuple[int, MessageKeys]:
    """As `unlock`, of candidates that are (key, context) each; with the place of the one that matches."""
    salt, commitment = bytes(head)[:SALT_SIZE], bytes(head)[SALT_SIZE:]
    found: tuple[int, MessageKeys] | None = None
    for place, (key, context) in enumerate(candidates):
        candidate = derive_message_keys(key, salt, context)
        if hmac.compare_digest(candidate.commitment, commitment):
            found = place, candidate
    if found is None:
        raise invalid()
    return found


class Stream(ABC):
    """A transformation of bytes fed in any pieces: `update` any number of times, then `finalize` once.

    The first failure is final: every later call raises it again, and what was held is wiped.
    """

    def __init__(self) -> None:
        self._over: SealgateError | None = None

    def update(self, piece: Buffer) -> bytearray:
        """What became certain with *piece*; often empty. The result is the caller's."""
        if self._over is not None:
            raise self._over.with_traceback(None)
        try:
            view = memoryview(piece)
            return self._update(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
        except BaseException as error:
            self._fail(error)
            raise

    def finalize(self) -> bytes:
        """The rest, once all input was given. MisuseError when called twice."""
        if self._over is not None:
            raise self._over.with_traceback(None)
        try:
            rest = self._finalize()
        except BaseException as error:
            self._fail(error)
            raise
        self._over = MisuseError("this stream is finished")
        self._forget()
        return rest

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, SealgateError):
            self._over = error
        else:
            self._over = MisuseError(f"this stream failed earlier: {type(error).__name__}")
        self._forget()

    @abstractmethod
    def _update(self, piece: memoryview) -> bytearray: ...

    @abstractmethod
    def _finalize(self) -> bytes: ...

    @abstractmethod
    def _forget(self) -> None:
        """Wipe what is staged and drop the keys."""


class _Chunks(Stream):
    """What sealing and opening share: the staged piece of a chunk and the running number."""

    def __init__(self, keys: MessageKeys | None, *, stage_size: int, number: int) -> None:
        super().__init__()
        self._keys = keys
        # A view: assigning to a slice of a bytearray would copy the piece twice.
        self._stage = memoryview(bytearray(stage_size))
        self._staged = 0
        self._number = number

    @override
    def _forget(self) -> None:
        self._keys = None
        self._stage[:] = bytes(len(self._stage))

    def _take(self, count: int) -> tuple[MessageKeys, int]:
        """The keys and the first of *count* chunk numbers, which are used up."""
        keys, number = self._keys, self._number
        if keys is None:
            raise MisuseError("this stream is finished")
        if number + count > CHUNK_LIMIT:
            raise FormatError(f"a message has at most {CHUNK_LIMIT} chunks")
        self._number = number + count
        return keys, number


class MessageSealer(_Chunks):
    """Seals one message under *key*, bound to *context*; *lead* is put in front of it, in the clear.

    *key*: 32 bytes, MisuseError otherwise. `update` and `finalize` raise FormatError beyond 2^52 - 1 bytes.
    *content_sha256*: of the whole content, which has to be known before; then the salt is synthetic
    (docs/format.md 2.4), and `finalize` raises MisuseError if something else was sealed.
    """

    def __init__(
        self, key: Buffer, context: bytes, *, lead: bytes = b"", content_sha256: bytes | None = None
    ) -> None:
        salt = _fresh_salt() if content_sha256 is None else _synthetic_salt(key, context, content_sha256)
        self._expected = content_sha256
        self._sha256 = None if content_sha256 is None else hashlib.sha256()
        keys = derive_message_keys(key, salt, context)
        super().__init__(keys, stage_size=CHUNK_SIZE, number=0)
        self.commitment: Final = keys.commitment
        """Names this very message: a manifest lists it (docs/format.md 3.5)."""
        self._lead = lead + salt + keys.commitment

    @override
    def _update(self, piece: memoryview) -> bytearray:
        if self._sha256 is not None:
            self._sha256.update(piece)
        stage, staged = self._stage, self._staged
        count, rest = divmod(staged + len(piece), CHUNK_SIZE)
        lead, put, took = self._lead, len(self._lead), 0
        out = bytearray(put + count * RECORD_SIZE)
        if lead:
            out[:put] = lead
            self._lead = b""
        if count:
            keys, number = self._take(count)
            base, seal = keys.base_nonce, keys.aead.encrypt_into
            target = memoryview(out)
            if staged:
                took = CHUNK_SIZE - staged
                stage[staged:] = piece[:took]
                seal((base ^ number).to_bytes(12), stage, None, target[put : put + RECORD_SIZE])
                put += RECORD_SIZE
                number += 1
                staged = 0
            # The hot loop: every name is local, and one chunk costs one call.
            for at in range(put, len(out), RECORD_SIZE):
                nonce = (base ^ number).to_bytes(12)
                seal(nonce, piece[took : took + CHUNK_SIZE], None, target[at : at + RECORD_SIZE])
                took += CHUNK_SIZE
                number += 1
        if rest:
            stage[staged:rest] = piece[took:]
        self._staged = rest
        return out

    @override
    def _finalize(self) -> bytes:
        if self._sha256 is not None and self._sha256.digest() != self._expected:
            raise MisuseError("what was sealed is not the content whose digest was given")
        keys, number = self._take(1)
        nonce = (keys.base_nonce ^ number).to_bytes(12)
        lead, self._lead = self._lead, b""
        return lead + keys.aead.encrypt(nonce, self._stage[: self._staged], None)


class ChunkOpener(_Chunks):
    """Opens consecutive chunks, the first of which has number *first*; `finalize` opens the last of all.

    IntegrityError, TruncatedError; FormatError beyond the chunk limit.
    """

    def __init__(self, keys: MessageKeys | None, *, first: int = 0) -> None:
        super().__init__(keys, stage_size=RECORD_SIZE, number=first)

    @override
    def _update(self, piece: memoryview) -> bytearray:
        stage, staged = self._stage, self._staged
        count, rest = divmod(staged + len(piece), RECORD_SIZE)
        put, took = 0, 0
        out = bytearray(count * CHUNK_SIZE)
        if count:
            keys, number = self._take(count)
            base, open_into = keys.base_nonce, keys.aead.decrypt_into
            target = memoryview(out)
            try:
                if staged:
                    took = RECORD_SIZE - staged
                    stage[staged:] = piece[:took]
                    open_into((base ^ number).to_bytes(12), stage, None, target[:CHUNK_SIZE])
                    put = CHUNK_SIZE
                    number += 1
                    staged = 0
                for at in range(put, len(out), CHUNK_SIZE):
                    nonce = (base ^ number).to_bytes(12)
                    open_into(nonce, piece[took : took + RECORD_SIZE], None, target[at : at + CHUNK_SIZE])
                    took += RECORD_SIZE
                    number += 1
            except InvalidTag:
                target[:] = bytes(len(target))
                _refuse()
        if rest:
            stage[staged:rest] = piece[took:]
        self._staged = rest
        return out

    @override
    def _finalize(self) -> bytes:
        if self._staged < TAG_SIZE:
            raise truncated()
        keys, number = self._take(1)
        nonce = (keys.base_nonce ^ number).to_bytes(12)
        try:
            return keys.aead.decrypt(nonce, self._stage[: self._staged], None)
        except InvalidTag:
            _refuse()


class MessageOpener(ChunkOpener):
    """Opens one message under the one of *keys* it commits to, if bound to *context*.

    *keys*: 32 bytes each, MisuseError otherwise; several only where trial is allowed (docs/format.md 6.4).
    IntegrityError, TruncatedError; FormatError beyond the chunk limit.
    """

    def __init__(self, keys: Sequence[Buffer], context: bytes) -> None:
        super().__init__(None)
        self._candidates: Sequence[Buffer] = keys
        self._context = context
        self._head = bytearray()

    @override
    def _update(self, piece: memoryview) -> bytearray:
        if self._keys is None:
            missing = HEAD_SIZE - len(self._head)
            self._head += piece[:missing]
            if len(self._head) < HEAD_SIZE:
                return bytearray()
            piece = piece[missing:]
            self._keys = unlock(self._candidates, self._context, self._head)
            self._candidates = ()
        return super()._update(piece)

    @override
    def _finalize(self) -> bytes:
        if self._keys is None:
            raise truncated()
        return super()._finalize()

    @override
    def _forget(self) -> None:
        super()._forget()
        self._candidates = ()


def _refuse() -> Never:
    # Without the cause: a log must not tell a failed tag from a failed commitment.
    raise invalid() from None


def _fresh_salt() -> bytes:
    """The only source of random salts. Only tests/vectors/make.py may replace it, to get fixed bytes."""
    return os.urandom(SALT_SIZE)


def _synthetic_salt(key: Buffer, context: bytes, content_sha256: bytes) -> bytes:
    """A function of key, context and content that nobody without the key can tell from a random one."""
    if len(content_sha256) != DIGEST_SIZE:
        raise MisuseError(f"a SHA-256 has {DIGEST_SIZE} bytes, not {len(content_sha256)}")
    info = _SYNTHETIC_LABEL + content_sha256 + context
    return HKDFExpand(SHA512(), SALT_SIZE, info).derive(_usable(key))
