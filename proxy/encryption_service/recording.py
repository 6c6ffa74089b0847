"""What stands in the audit log about one call of the encryption service.

1. Ids and names, sizes and outcomes: never a plaintext, a token, a signature.
2. What strangers wrote (reason, resource, request id) is cut and cleaned: no control character, no
   surrogate, a bounded length even when every character is escaped. The log's lines are canonical JSON, so
   nothing could forge one; this is for whoever reads them in a terminal, and for the disk.
3. An empty field is left out.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from envelope.audit import Value
from envelope.keys import KeyId
from proxy.encryption_service.errors import KeyRefused, NotRecorded, ServiceError
from proxy.encryption_service.model import DialectName

ACTION: Final = "service-call"
MAX_CHARS: Final = 512
MAX_DETAILS: Final = 8
_MAX_ESCAPED: Final = 3072
"""With as many fields as there can be, a line stays below envelope.audit.MAX_LINE_BYTES."""
_REPLACEMENT: Final = "�"
_UNWANTED: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


_TEXTS: Final = (
    ("tenant", "tenant"),
    ("key", "key"),
    ("caller", "caller"),
    ("credential", "credential_id"),
    ("request_id", "request_id"),
    ("resource", "resource"),
    ("reason", "reason"),
    ("error", "error"),
)


class Outcome(StrEnum):
    OK = "ok"
    REFUSED = "refused"  # the caller's or the key's fault
    FAILED = "failed"  # ours


@dataclass(slots=True, kw_only=True)
class Entry:
    """The audit record of one call, whatever came of it.

    (Not frozen: that alone would cost a tenth of an encryption.)
    """

    dialect: DialectName
    operation: str
    tenant: str = ""
    key: str = ""
    """A named key's name, or what the caller called it if it was not found."""
    version: int = 0
    key_id: KeyId | None = None
    caller: str = ""
    credential_id: str = ""
    request_id: str = ""
    """The provider's."""
    resource: str = ""
    reason: str = ""
    outcome: Outcome = Outcome.OK
    error: str = ""
    items: int = 1
    latency_us: int = 0
    detail: Mapping[str, str] = field(default_factory=dict)
    """What else the dialect has to say, public facts only: names `[a-z][a-z0-9_]*`, at most MAX_DETAILS."""


def refused(entry: Entry, error: ServiceError) -> Entry:
    """The same call, with what came of it in the end."""
    outcome = Outcome.FAILED if isinstance(error, NotRecorded) else Outcome.REFUSED
    return replace(entry, outcome=outcome, error=error_code(error))


def error_code(error: ServiceError) -> str:
    """What stands in `Entry.error`: the error's code, and for a key's state which."""
    return f"{error.code}:{error.why}" if isinstance(error, KeyRefused) else error.code


def fields_of(entry: Entry) -> dict[str, Value]:
    """The fields of the audit event (rules 2 and 3)."""
    fields: dict[str, Value] = {
        "dialect": entry.dialect.value,
        "operation": clean(entry.operation),
        "latency_us": entry.latency_us,
    }
    for name, attribute in _TEXTS:
        text = getattr(entry, attribute)
        if text:
            fields[name] = (
                text if len(text) <= MAX_CHARS and text.isascii() and text.isprintable() else clean(text)
            )
    if entry.version:
        fields["version"] = entry.version
    if entry.key_id is not None:
        fields["key_id"] = entry.key_id.raw.hex()
    if entry.items != 1:
        fields["items"] = entry.items
    for name, text in list(entry.detail.items())[:MAX_DETAILS]:
        fields.setdefault(name, clean(text))
    return fields


def clean(text: str) -> str:
    """*text* as it may stand in a log (rule 2)."""
    if len(text) <= MAX_CHARS and text.isascii() and text.isprintable():
        return text
    cleaned = "".join(
        _REPLACEMENT if unicodedata.category(character) in _UNWANTED else character
        for character in text[:MAX_CHARS]
    )
    room = _MAX_ESCAPED
    for index, character in enumerate(cleaned):
        room -= 1 if character.isascii() else 6 if character < "\U00010000" else 12
        if room < 0:
            return cleaned[:index]
    return cleaned
