"""`aws-chunked`: a body in chunks, each with its own signature, and trailers behind them (S3 API reference,
"Transferring Payload in Multiple Chunks").

    signed     1000;chunk-signature=<hex>, data, ... 0;chunk-signature=<hex>, trailers, an empty line
    unsigned   1000, data, ... 0, trailers, an empty line           (CR LF behind each of these)

1. A chunk's signature covers the chunk and the signature before it, so none can be changed, left out or
   exchanged; that of the trailers covers the last chunk's. They are compared in constant time.
2. Data goes on as it comes, before its chunk is verified: whoever takes it keeps back the end (the last
   record of a sealed object) until `finish` has returned. What fails, fails for good.
3. The decoded length is given, and kept to exactly. Trailers are those that were announced, each once.
4. A line is at most MAX_LINE bytes, there are at most MAX_TRAILERS trailers: a body cannot fill the memory.
"""

import hashlib
import hmac
import re
from enum import Enum
from typing import Final

from proxy import refusals
from proxy.messages.sigv4 import EMPTY_SHA256
from proxy.profiles.s3.authentication import ChunkKey
from proxy.refusals import RefusedError

MAX_LINE: Final = 1024
MAX_TRAILERS: Final = 16
_CHUNK: Final = re.compile(rb"([0-9a-fA-F]{1,16})(?:;chunk-signature=([0-9a-f]{64}))?")
_TRAILER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}):(.*)", re.DOTALL)
_TRAILER_VALUE: Final = re.compile(rb"[\x20-\x7e]{0,512}")
_TRAILER_SIGNATURE: Final = "x-amz-trailer-signature"


class _State(Enum):
    SIZE = "size"  # the line before a chunk
    DATA = "data"
    DATA_END = "data-end"  # the line end behind a chunk's data
    TRAILERS = "trailers"
    DONE = "done"
    FAILED = "failed"


class _Signatures:
    """The chain of signatures (rule 1)."""

    def __init__(self, key: ChunkKey) -> None:
        self._key = key
        self._before = key.seed

    def check_chunk(self, digest: str, signature: bytes) -> None:
        self._check("AWS4-HMAC-SHA256-PAYLOAD", (EMPTY_SHA256, digest), signature)

    def check_trailers(self, trailers: bytes, signature: bytes) -> None:
        self._check("AWS4-HMAC-SHA256-TRAILER", (hashlib.sha256(trailers).hexdigest(),), signature)

    def _check(self, algorithm: str, digests: tuple[str, ...], signature: bytes) -> None:
        text = "\n".join((algorithm, self._key.amz_date, str(self._key.scope), self._before, *digests))
        expected = hmac.digest(self._key.key, text.encode(), "sha256").hex()
        if not hmac.compare_digest(expected.encode(), signature):
            raise RefusedError(refusals.SIGNATURE_MISMATCH)
        self._before = expected


class AwsChunked:
    """Decodes one body. *key*: chunks must be signed with it; None: they must not be signed.

    RefusedError from `feed` and `finish`: SIGNATURE_MISMATCH, BAD_LENGTH, BAD_MESSAGE, INVALID_DIGEST for
    trailers that are not those announced.
    """

    def __init__(self, *, decoded_bytes: int, announced: frozenset[str], key: ChunkKey | None) -> None:
        self._left = decoded_bytes
        self._announced = announced
        self._signatures = _Signatures(key) if key is not None else None
        self._state = _State.SIZE
        self._line = bytearray()
        self._chunk_left = 0
        self._chunk_signature = b""
        self._chunk_hash = hashlib.sha256()
        self._last = False
        self._signed_trailers = bytearray()
        self.trailers: Final[dict[str, str]] = {}
        """By lower-case name; complete once `finish` has returned."""

    def feed(self, piece: bytes) -> bytes:
        try:
            return self._feed(memoryview(piece))
        except BaseException:
            self._state = _State.FAILED
            raise

    def finish(self) -> bytes:
        if self._state is not _State.DONE or self._line:
            self._state = _State.FAILED
            raise RefusedError(refusals.BAD_LENGTH)
        if self._left:
            raise RefusedError(refusals.BAD_LENGTH)
        return b""

    def _feed(self, view: memoryview) -> bytes:
        made: list[memoryview] = []
        while len(view):
            if self._state is _State.DATA:
                data, view = view[: self._chunk_left], view[self._chunk_left :]
                self._take(data)
                made.append(data)
                continue
            if self._state in (_State.DONE, _State.FAILED):
                raise RefusedError(refusals.BAD_MESSAGE)
            line, view = self._take_line(view)
            if line is not None:
                self._on_line(line)
        return b"".join(made)

    def _take(self, data: memoryview) -> None:
        if self._signatures is not None:
            self._chunk_hash.update(data)
        self._chunk_left -= len(data)
        if not self._chunk_left:
            self._end_chunk()
            self._state = _State.DATA_END

    def _take_line(self, view: memoryview) -> tuple[bytes | None, memoryview]:
        """The line that *view* completes, without its end, and what follows it."""
        room = MAX_LINE - len(self._line)
        begin = bytes(view[:room])
        at = begin.find(b"\n")
        if at < 0:
            self._line += begin
            if len(self._line) >= MAX_LINE:
                raise RefusedError(refusals.BAD_MESSAGE)
            return None, view[len(begin) :]
        line = bytes(self._line) + begin[: at + 1]
        self._line.clear()
        if line.endswith(b"\r\n"):
            return line[:-2], view[at + 1 :]
        if self._state is _State.TRAILERS:
            # The reference's own example ends trailers with a line feed alone.
            return line[:-1], view[at + 1 :]
        raise RefusedError(refusals.BAD_MESSAGE)

    def _on_line(self, line: bytes) -> None:
        match self._state:
            case _State.SIZE:
                self._begin_chunk(line)
            case _State.DATA_END:
                if line:
                    raise RefusedError(refusals.BAD_MESSAGE)
                self._state = _State.SIZE
            case _:
                self._on_trailer(line)

    def _begin_chunk(self, line: bytes) -> None:
        match = _CHUNK.fullmatch(line)
        if match is None or (match[2] is not None) != (self._signatures is not None):
            raise RefusedError(refusals.BAD_MESSAGE)
        self._chunk_left = int(match[1], 16)
        self._chunk_signature = match[2] or b""
        self._chunk_hash = hashlib.sha256()
        if self._chunk_left > self._left:
            raise RefusedError(refusals.BAD_LENGTH)
        self._left -= self._chunk_left
        if self._chunk_left:
            self._state = _State.DATA
        else:
            self._end_chunk()
            self._state = _State.TRAILERS

    def _end_chunk(self) -> None:
        if self._signatures is not None:
            self._signatures.check_chunk(self._chunk_hash.hexdigest(), self._chunk_signature)

    def _on_trailer(self, line: bytes) -> None:
        if not line:
            self._end_trailers()
            return
        match = _TRAILER.fullmatch(line)
        told = b"" if match is None else match[2].strip(b" \t")
        if match is None or _TRAILER_VALUE.fullmatch(told) is None:
            raise RefusedError(refusals.BAD_MESSAGE)
        name, value = match[1].decode().lower(), told.decode()
        if name in self.trailers or len(self.trailers) >= MAX_TRAILERS:
            raise RefusedError(refusals.BAD_MESSAGE)
        if name != _TRAILER_SIGNATURE:
            if name not in self._announced:
                raise RefusedError(refusals.INVALID_DIGEST)
            self._signed_trailers += f"{name}:{value}\n".encode()
        self.trailers[name] = value

    def _end_trailers(self) -> None:
        signature = self.trailers.pop(_TRAILER_SIGNATURE, None)
        if self.trailers.keys() != self._announced:
            raise RefusedError(refusals.INVALID_DIGEST)
        if self._signatures is not None and self._announced:
            if signature is None:
                raise RefusedError(refusals.SIGNATURE_MISMATCH)
            self._signatures.check_trailers(bytes(self._signed_trailers), signature.encode())
        elif signature is not None:
            raise RefusedError(refusals.BAD_MESSAGE)
        self._state = _State.DONE
