"""Uploads that a page cuts into chunks, one request each, for the application to join.

1. Each chunk would be sealed for itself, and what the application joins would open nowhere: it is refused
   before anything is stored. A page falls back to, or can be set to, one request for each file.
2. Known are the fields of Dropzone, Resumable.js, Flow.js, Plupload, Fine Uploader, and Content-Range
   (jQuery File Upload); in the form and in the query. A file in one chunk is a file.
"""

from typing import Final
from urllib.parse import parse_qsl

from proxy.messages.message import RequestHead

_TOTALS: Final = frozenset(
    {"chunks", "dztotalchunkcount", "flowtotalchunks", "qqtotalparts", "resumabletotalchunks"}
)
_RANGE_OF_WHOLE: Final = "content-range"


def is_in_chunks(head: RequestHead) -> bool:
    """Whether the request says by its head that it brings a chunk of something."""
    if _RANGE_OF_WHOLE in head.fields:
        return True
    query = head.target.partition("?")[2]
    return any(says_chunk(name, value) for name, value in parse_qsl(query, keep_blank_values=True))


def says_chunk(name: str, value: str) -> bool:
    """Whether a field or a parameter of this name says that there are several chunks."""
    return name.lower() in _TOTALS and value.strip() not in ("", "0", "1")
