"""Where a request of a resumable upload says that its content belongs. Pure.

https://cloud.google.com/storage/docs/performing-resumable-uploads

`bytes 0-262143/*`, `bytes 262144-300000/300001`, `bytes */300001`, `bytes */*`. Without an end
(`bytes 0-*/*`) the body goes on to the end of the content; without the field it is all of the content.
"""

import re
from dataclasses import dataclass
from typing import Final

from proxy import refusals
from proxy.messages.message import Fields, Framing
from proxy.plans.request import Request
from proxy.profiles.gcs.sessions import GRANULE_BYTES
from proxy.refusals import RefusedError

_CONTENT_RANGE: Final = re.compile(
    r"bytes (?:(?P<start>[0-9]{1,15})-(?:(?P<last>[0-9]{1,15})|\*)|\*)/(?:(?P<total>[0-9]{1,15})|\*)"
)
_RANGE: Final = re.compile(r"bytes=0-([0-9]{1,15})")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRange:
    """What a request says of its place in the content; `total` None: it does not say how long that is."""

    start: int = 0
    stop: int | None = None
    """None: as far as the body goes."""
    total: int | None = None
    is_status: bool = False
    """It has no content: where is the upload, or: this was all of it."""
    is_rest: bool = False
    """The body goes on to the content's end, wherever that is."""

    @classmethod
    def of(cls, request: Request) -> "AskedRange":
        """RefusedError(BAD_MESSAGE, BAD_LENGTH)."""
        fields = request.head.fields
        if "content-range" not in fields:
            return cls(is_rest=True) if may_have_body(request) else cls(total=0, is_status=True)
        match = _CONTENT_RANGE.fullmatch(fields.sole("content-range") or "")
        if match is None:
            raise RefusedError(refusals.BAD_MESSAGE)
        total = None if match["total"] is None else int(match["total"])
        if match["start"] is None:
            return cls(total=total, is_status=True)
        start = int(match["start"])
        if match["last"] is None:
            if total is not None and start > total:
                raise RefusedError(refusals.BAD_MESSAGE)
            return cls(start=start, total=total, is_rest=True)
        stop = int(match["last"]) + 1
        length = request.frame.length_bytes
        if stop <= start or (total is not None and stop > total):
            raise RefusedError(refusals.BAD_MESSAGE)
        if length is not None and length != stop - start:
            raise RefusedError(refusals.BAD_LENGTH)
        return cls(start=start, stop=stop, total=total)


def may_have_body(request: Request) -> bool:
    return request.frame.is_declared or request.frame.framing is Framing.STREAM


def persisted_bytes(fields: Fields) -> int:
    """How much the service says, in a 308, that it has: whole granules of it.

    What it names beyond them is not there yet; emulators say 0-0 for nothing.
    """
    match = _RANGE.fullmatch(fields.sole("range") or "")
    return 0 if match is None else (int(match[1]) + 1) // GRANULE_BYTES * GRANULE_BYTES
