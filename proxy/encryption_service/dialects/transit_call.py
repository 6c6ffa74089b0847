"""One call of the transit API while it is served: what it says of itself, and the shape of its answers."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from proxy.encryption_service.access import Caller
from proxy.encryption_service.call import Answer, Call, DuplicateHeaderError
from proxy.encryption_service.core import Purpose, Ticket
from proxy.encryption_service.dialects.bearer import BearerCalls, Work
from proxy.encryption_service.dialects.transit_bodies import MAX_VERSION, BodyError, decode_base64
from proxy.encryption_service.dialects.transit_errors import (
    HEADERS,
    MAX_ERROR_CHARS,
    UNSUPPORTED_PATH,
    VaultError,
)
from proxy.encryption_service.model import DialectName, Op

READING: Final = frozenset({"GET", "LIST"})
WRITING: Final = frozenset({"POST", "PUT"})

TOKEN_HEADER: Final = "x-vault-token"  # noqa: S105 - a header's name
_WANTED: Final = frozenset({TOKEN_HEADER, "authorization", "x-vault-namespace", "x-vault-wrap-ttl"})
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_NO_CONTEXT: Final = Purpose(DialectName.TRANSIT)
_FORMAT: Final = b"\x01"
"""The first byte of a ciphertext, bound by standing before the associated data."""

SUCCESS: Final = (
    b'{"request_id":"%b","lease_id":"","renewable":false,"lease_duration":0,"data":%b,'
    b'"wrap_info":null,"warnings":%b,"auth":null}\n'
)


@dataclass(slots=True)
class TransitRequest:
    """One call while it is served."""

    call: Call
    work: Work
    caller: Caller
    name: str
    warnings: list[str] = field(default_factory=list)


def admit(calls: BearerCalls, request: TransitRequest, op: Op) -> Ticket:
    """Leave for *op* with the key that the path names. As `BearerCalls.admit`; VaultError for no name."""
    name = request.name
    if not _NAME.fullmatch(name):
        if name.endswith("/"):
            raise VaultError(400, "cannot write to a path ending in '/'")
        raise VaultError(404, UNSUPPORTED_PATH)
    return calls.admit(request.work, request.caller, name, op)


def headers_of(call: Call) -> dict[str, str]:
    """Those that matter here. DuplicateHeaderError."""
    found: dict[str, str] = {}
    for name, value in call.headers:
        if name in _WANTED:
            if name in found:
                raise DuplicateHeaderError(f"the header {name} stands twice")
            found[name] = value
    return found


def token_of(headers: Mapping[str, str]) -> str:
    """The token, empty if there is none."""
    token = headers.get(TOKEN_HEADER)
    if token:
        return token
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else ""


def purpose_of(context: str, problem: str = "") -> Purpose:
    if not context:
        return _NO_CONTEXT
    try:
        return Purpose(DialectName.TRANSIT, decode_base64(context))
    except BodyError:
        if problem:
            raise BodyError(problem) from None
        raise


def associated_data_of(data: str) -> bytes:
    """With the format's byte before it, so that a later format cannot be taken for this one."""
    if not data:
        return _FORMAT
    try:
        return _FORMAT + decode_base64(data)
    except BodyError as error:
        problem = f"unable to get associated_data/additional_data from factory[0]: {error.text}"
        raise BodyError(problem) from None


def wanted_version(version: int, noun: str) -> int | None:
    """None: the newest that is active."""
    if version == 0:
        return None
    if version < 0:
        raise BodyError(f"requested version for {noun} is negative")
    if version > MAX_VERSION:
        raise BodyError(f"requested version for {noun} is higher than the latest key version")
    return version


def new_request_id() -> str:
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def answer(status: int, body: bytes) -> Answer:
    return Answer(status=status, body=body, headers=HEADERS)


def success(
    request: TransitRequest, data: Mapping[str, Any], ignored: list[str] | None = None, *, status: int = 200
) -> Answer:
    warnings = list(request.warnings)
    if ignored:
        names = " ".join(ignored)[:MAX_ERROR_CHARS]
        warnings.append(f"Endpoint ignored these unrecognized parameters: [{names}]")
    encode = msgspec.json.encode
    request_id = request.work.client_request_id.encode()
    return answer(status, SUCCESS % (request_id, encode(data), encode(warnings or None)))


def json_answer(status: int, document: Mapping[str, Any], *, empty: bool = False) -> Answer:
    return answer(status, b"" if empty else msgspec.json.encode(document) + b"\n")
