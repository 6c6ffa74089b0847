"""Forms of a web application (multipart/form-data): the files in them sealed, all else byte for byte.

1. What has a file's name is content, and is sealed; so is what the options do not say is none. A part that
   names a file and brings nothing, as browsers send where none was chosen, stays as it is.
2. Other parts are short texts and pass in the clear, each and all of them within a limit: a long text is
   content, and there is nobody who could seal it there.
3. What the service is told of the form's length (WebOptions.form_length) is true, or nothing: it is known
   when all has been sealed; or before, where the only file is the last part; or it is not told.
4. Digests of the form as it came are compared at its end, before the service gets that.
"""

import hashlib
import hmac
from typing import Final

from envelope.objects import PLAIN_LIMIT, sealed_length
from proxy import refusals
from proxy.messages.message import ExpectedDigest
from proxy.messages.multipart_form import (
    Body,
    Collect,
    FormPart,
    FormRewriter,
    Through,
    Treatment,
    ending_bytes,
)
from proxy.plans.plan import NewSealer
from proxy.profiles.web.chunks import says_chunk
from proxy.profiles.web.options import FieldRule, FormLength, WebOptions
from proxy.refusals import RefusedError

MAX_TEXTS_BYTES: Final = 1024 * 1024
"""Of all texts of a form together, with the heads of their parts: they wait for its first file."""


class SealedForm:
    """The reshaper of one form (proxy/plans/plan.py). *total_bytes*: its length, if it was said."""

    def __init__(
        self,
        boundary: bytes,
        options: WebOptions,
        new_sealer: NewSealer,
        *,
        total_bytes: int | None,
        digests: tuple[ExpectedDigest, ...] = (),
    ) -> None:
        self.out_bytes: int | None = None
        self._boundary = boundary
        self._options = options
        self._new_sealer = new_sealer
        self._total_bytes = total_bytes
        self._expected = digests
        self._hashes = {each.algorithm: hashlib.new(each.algorithm) for each in digests}
        self._rewriter = FormRewriter(boundary, self._treatment)
        self._text_bytes = 0
        self._is_last_begun = False
        """The file has begun behind which nothing may come."""
        self._held: bytearray | None = bytearray() if self._is_streamed_whole else None
        """What waits for the length; None: nothing does."""

    @property
    def _is_streamed_whole(self) -> bool:
        return self._options.form_length is FormLength.LAST

    def feed(self, piece: bytes) -> bytes:
        for digest in self._hashes.values():
            digest.update(piece)
        made = self._rewriter.feed(piece)
        if self._held is None:
            return made
        self._held += made
        if not self._is_last_begun:
            if len(self._held) > MAX_TEXTS_BYTES:
                raise RefusedError(refusals.TOO_LARGE)
            return b""
        return self._let_go()

    def finish(self) -> bytes:
        rest = self._rewriter.finish()
        for each in self._expected:
            if not hmac.compare_digest(self._hashes[each.algorithm].digest(), each.value):
                raise RefusedError(refusals.BAD_DIGEST)
        if self._held is None:
            return rest
        self.out_bytes = self._total_bytes  # no file: as it came
        return self._let_go() + rest

    def _let_go(self) -> bytes:
        held, self._held = bytes(self._held or b""), None
        return held

    def _treatment(self, part: FormPart) -> Treatment:
        if self._is_last_begun:
            raise RefusedError(refusals.UNKNOWN_ROUTE)  # its length would be another than was said
        rule = self._options.fields.get(part.name)
        if rule is FieldRule.REFUSE:
            raise RefusedError(refusals.UNKNOWN_ROUTE)
        if rule is FieldRule.CLEAR or not part.is_file:
            return Collect(
                function=lambda value: self._text(part.name, value), limit_bytes=self._options.field_bytes
            )
        if not part.filename and "content-length" in part.fields:
            raise RefusedError(refusals.BAD_MESSAGE)  # of which of the two it may become?
        plain_bytes = self._length_of_last(part) if self._is_streamed_whole else None
        body = _File(self._new_sealer, may_be_none=not part.filename)
        return Through(body=body, plain_bytes=plain_bytes)

    def _text(self, name: str, value: bytes) -> bytes:
        if says_chunk(name, value.decode("latin-1")):
            raise RefusedError(refusals.PARTIAL_WRITE)
        self._text_bytes += len(value)
        if self._text_bytes > MAX_TEXTS_BYTES:
            raise RefusedError(refusals.TOO_LARGE)
        return value

    def _length_of_last(self, part: FormPart) -> int:
        """Of the content of *part*, if it is the last one; then the form's length is known."""
        if self._total_bytes is None:
            raise RefusedError(refusals.LENGTH_REQUIRED)
        plain_bytes = self._total_bytes - part.content_at - ending_bytes(self._boundary)
        if not 0 <= plain_bytes < PLAIN_LIMIT:
            raise RefusedError(refusals.BAD_LENGTH)
        is_none = not part.filename and not plain_bytes
        grown = 0 if is_none else sealed_length(plain_bytes) - plain_bytes
        own_length = part.fields.get("content-length")
        if own_length is not None:
            grown += len(str(sealed_length(plain_bytes))) - len(own_length)
        self.out_bytes = self._total_bytes + grown
        self._is_last_begun = True
        return plain_bytes


class _File:
    """A file's content on its way. *may_be_none*: without a byte it is no file."""

    def __init__(self, new_sealer: NewSealer, *, may_be_none: bool) -> None:
        self._new_sealer = new_sealer
        self._sealer: Body | None = None if may_be_none else new_sealer()

    def update(self, piece: bytes) -> bytes | bytearray:
        if self._sealer is None:
            if not piece:
                return b""
            self._sealer = self._new_sealer()
        return self._sealer.update(piece)

    def finalize(self) -> bytes | bytearray:
        return b"" if self._sealer is None else self._sealer.finalize()
