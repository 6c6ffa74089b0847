"""The parameter `fields`: which members of an answer a client wants to have. Pure.

https://cloud.google.com/storage/docs/json_api#partial-response

1. Sizes are found by our mark in an object's metadata (told.py). Where a read or a list selects sizes and not
   metadata, metadata is asked for, too, and taken out again.
2. What is selected in a way that we do not change is passed on as it is: then objects are looked at, one by
   one, and those that the answer does not name have no size.
"""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote, unquote_plus

from proxy.messages.message import RequestHead
from proxy.profiles.gcs.routes import Kind, Operation

_NAMES: Final = ("fields", "$fields")
_FIELD: Final = "x-goog-fieldmask"
_ITEMS: Final = re.compile(r"(?:\A|,)items\(")
_MEMBER: Final = re.compile(r"[A-Za-z]+(?:,[A-Za-z]+)*")
_METADATA: Final = re.compile(r"\bmetadata\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What was asked of the service; `target` None: as the client asked."""

    bucket: str
    """Of the objects, where the answer does not say it."""
    target: str | None = None
    is_partial: bool = False
    """Metadata may be missing because it was not asked for."""
    adds_metadata: bool = False
    """It was asked for by us."""

    @classmethod
    def of(cls, head: RequestHead, operation: Operation) -> "Selection":
        bucket = unquote(operation.bucket, errors="surrogateescape")
        path, _, query = head.target.partition("?")
        pairs = query.split("&")
        chosen = [at for at, pair in enumerate(pairs) if unquote_plus(pair.partition("=")[0]) in _NAMES]
        if not chosen and _FIELD not in head.fields:
            return cls(bucket=bucket)
        if len(chosen) == 1 and _FIELD not in head.fields:
            name, _, value = pairs[chosen[0]].partition("=")
            selection = unquote_plus(value)
            if selection in ("", "*"):
                return cls(bucket=bucket)
            wider = _with_metadata(selection, operation.kind)
            if wider is not None:
                pairs[chosen[0]] = f"{name}={quote(wider, safe='(),/*')}"
                return cls(bucket=bucket, target=f"{path}?{'&'.join(pairs)}", adds_metadata=True)
            if _METADATA.search(selection):
                return cls(bucket=bucket)
        return cls(bucket=bucket, is_partial=True)


def _with_metadata(selection: str, kind: Kind) -> str | None:
    """The same with the objects' metadata; None: it is there, or it is not known how to write this."""
    if _METADATA.search(selection):
        return None
    if kind is Kind.OBJECT and _MEMBER.fullmatch(selection):
        return f"metadata,{selection}"
    if kind is Kind.LIST and len(_ITEMS.findall(selection)) == 1:
        return _ITEMS.sub(lambda found: f"{found[0]}metadata,", selection)
    return None
