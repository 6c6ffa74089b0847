"""Uploads by an HTML form (PostObject): the file sealed as it streams, the policy judged and signed anew.

1. The fields before the file are collected, at most `MAX_FIELDS_BYTES`; nothing is sent before the file's
   head has come and the policy's signature, dates and length have been judged. What else the policy demands
   of the fields, the service judges: they go up as they came.
2. `content-length-range` is about what the client sends. It is judged on the plaintext, which the form's
   length tells, and is put in terms of stored bytes for the service; then the policy is signed again. A
   policy that needs no change goes as it came, byte for byte.
3. A policy signed with an access key that is not in the vault goes as it came, too, where the service's
   options let it; the service judges all of it, and its range by stored bytes. So does a form without one.
4. The file is the last part, as S3 has it: what stands behind it is refused, not ignored. Fields with
   checksums are refused: they would be stored with, or compared to, ciphertext; so is client metadata that
   is a digest by its name, unless it is to be kept (no field can be taken out of a signed form).
"""

import base64
import binascii
import hmac
import json
import re
import secrets as random_secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from envelope.objects import PLAIN_LIMIT, sealed_length
from proxy import refusals
from proxy.messages import sigv4
from proxy.messages.message import AnswerHead, Fields, digest_fields
from proxy.messages.multipart_form import (
    Collect,
    FormPart,
    FormRewriter,
    Through,
    Treatment,
    boundary_of,
    ending_bytes,
)
from proxy.messages.sigv4 import Scope
from proxy.plans.answer_plan import AnswerPlan, MapWhole, Pass
from proxy.plans.conversing import Conversation, Reply
from proxy.plans.plan import NewSealer, RequestPlan, Reshape
from proxy.plans.request import Request
from proxy.profiles.s3.authentication import SERVICE, Standing, admit
from proxy.profiles.s3.call import MAX_DOCUMENT_BYTES, Call
from proxy.profiles.s3.documents import map_result
from proxy.profiles.s3.hoisted import is_checksum
from proxy.profiles.s3.options import MetadataDigests, options_of
from proxy.refusals import RefusedError
from proxy.vault.model import UpstreamCredential

MAX_FIELDS_BYTES: Final = 128 * 1024
MAX_POLICY_BYTES: Final = 64 * 1024
_FILE: Final = "file"
_RANGE: Final = "content-length-range"
_META: Final = "x-amz-meta-"
_CREDENTIAL: Final = re.compile(
    r"(?P<key>[!-+\--.0-~]{1,128})/(?P<day>[0-9]{8})/(?P<region>[A-Za-z0-9_-]{1,64})/s3/aws4_request"
)
_SIGNATURE: Final = re.compile(r"[0-9a-f]{64}")
# What is written anew where the policy is signed anew.
_REPLACED: Final[tuple[str, ...]] = ("policy", "x-amz-credential", "x-amz-signature")
_VERSION_2: Final = frozenset({"awsaccesskeyid", "signature"})
_FORM_FIELD: Final = re.compile(r"[\x21-\x7e]{1,256}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """The memo of a form on its way."""


def plan_form(call: Call) -> RequestPlan:
    """RefusedError for a form without a length, or what is no form."""
    boundary = boundary_of(call.fields.sole("content-type") or "")
    total_bytes = call.request.frame.length_bytes
    if total_bytes is None:
        raise RefusedError(refusals.LENGTH_REQUIRED)
    return Reshape(
        edits=call.edits,
        sign=call.sign,
        memo=Posted(),
        make=lambda new_sealer: FormUpload(boundary, total_bytes, call.request, new_sealer),
    )


def plan_posted(request: Request, answer: AnswerHead, proposed: AnswerPlan) -> AnswerPlan:
    """The answer to a form: 201 has a document with tag and address, mostly."""
    if not isinstance(proposed, Pass) or answer.status != 201:
        return proposed

    async def mapped(_talk: Conversation, head: AnswerHead, body: bytes) -> Reply:
        return Reply(status=head.status, body=map_result(body, request) if body.strip() else body)

    return replace(proposed, body=MapWhole(limit_bytes=MAX_DOCUMENT_BYTES, function=mapped))


class FormUpload:
    """The reshaper of one form (proxy/plans/plan.py): `out_bytes` is known with the first output."""

    def __init__(self, boundary: bytes, total_bytes: int, request: Request, new_sealer: NewSealer) -> None:
        self.out_bytes: int | None = None
        self._boundary = boundary
        self._total_bytes = total_bytes
        self._request = request
        self._new_sealer = new_sealer
        self._rewriter = FormRewriter(boundary, self._treatment)
        self._fields: dict[str, bytes] = {}
        self._marks: dict[str, bytes] = {name: random_secrets.token_bytes(32) for name in _REPLACED}
        self._held = bytearray()
        self._replacements: dict[str, bytes] | None = None
        """Of the marks; None until the file's head has come."""
        self._is_sent = False

    def feed(self, piece: bytes) -> bytes:
        made = self._rewriter.feed(piece)
        if self._is_sent:
            return made
        self._held += made
        if self._replacements is None:
            if len(self._held) > MAX_FIELDS_BYTES:
                raise RefusedError(refusals.TOO_LARGE)
            return b""
        self._is_sent = True
        out = bytes(self._held)
        self._held.clear()
        for name, new in self._replacements.items():
            out = out.replace(self._marks[name], new, 1)
        return out

    def finish(self) -> bytes:
        if not self._is_sent:
            raise RefusedError(refusals.BAD_MESSAGE)  # a form without a file
        return self._rewriter.finish()

    def _treatment(self, part: FormPart) -> Treatment:
        name = part.name.lower()
        if self._replacements is not None or name in self._fields or not _FORM_FIELD.fullmatch(name):
            raise RefusedError(refusals.BAD_MESSAGE)
        if name == _FILE:
            return self._file(part)
        if part.is_file or self._is_digest(name):
            raise RefusedError(refusals.UNKNOWN_ROUTE)
        return Collect(function=lambda value: self._collected(name, value))

    def _is_digest(self, name: str) -> bool:
        if name.startswith(_META):
            keeps = options_of(self._request).metadata_digests is MetadataDigests.KEEP
            return not keeps and bool(digest_fields(Fields([(name.encode(), b"")])))
        return is_checksum(name) or name == "content-md5"

    def _collected(self, name: str, value: bytes) -> bytes:
        self._fields[name] = value
        return self._marks.get(name, value)

    def _file(self, part: FormPart) -> Treatment:
        plain_bytes = self._total_bytes - part.content_at - ending_bytes(self._boundary)
        if not 0 <= plain_bytes < PLAIN_LIMIT:
            raise RefusedError(refusals.BAD_LENGTH)
        as_they_came: dict[str, bytes] = {
            name: self._fields[name] for name in _REPLACED if name in self._fields
        }
        policy = judged(self._fields, self._request, plain_bytes)
        self._replacements = {**as_they_came, **policy}
        grown = sum(len(self._replacements[name]) - len(came) for name, came in as_they_came.items())
        stored_bytes = sealed_length(plain_bytes)
        own_length = part.fields.get("content-length")
        if own_length is not None:
            grown += len(str(stored_bytes)) - len(own_length)
        self.out_bytes = self._total_bytes - plain_bytes + stored_bytes + grown
        return Through(body=self._new_sealer(), plain_bytes=plain_bytes)


# Policies.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signed:
    """How a form was signed."""

    policy: bytes
    scope: Scope
    credential: UpstreamCredential = field(repr=False)


def judged(fields: Mapping[str, bytes], request: Request, plain_bytes: int) -> dict[str, bytes]:
    """The fields to be written anew, for a form with a file of *plain_bytes*. RefusedError, VaultError."""
    if not _VERSION_2.isdisjoint(fields):
        raise RefusedError(refusals.SIGNATURE_VERSION)
    if "policy" not in fields:
        if "x-amz-signature" in fields:
            raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
        admit(Standing.ANONYMOUS, options_of(request))
        return {}
    document = _document(fields["policy"])
    signed = _verified(fields, request)
    limits = [_limits(item) for item in document["conditions"] if _is_range(item)]
    for low, high in limits:
        if plain_bytes > high:
            raise RefusedError(refusals.CONTENT_TOO_LARGE)
        if plain_bytes < low:
            raise RefusedError(refusals.CONTENT_TOO_SMALL)
    if signed is None:
        return {}
    if _expiration_s(document) <= request.now_s:
        raise RefusedError(refusals.SIGNATURE_EXPIRED)
    return _signed_anew(document, signed, has_limits=bool(limits))


def _verified(fields: Mapping[str, bytes], request: Request) -> _Signed | None:
    """None: signed with an access key that is not in the vault."""
    algorithm, credential, date, signature = (
        fields.get(name, b"").decode("latin-1")
        for name in ("x-amz-algorithm", "x-amz-credential", "x-amz-date", "x-amz-signature")
    )
    claim = _CREDENTIAL.fullmatch(credential)
    if algorithm != sigv4.ALGORITHM:
        raise RefusedError(refusals.SIGNATURE_VERSION)
    if claim is None or not _SIGNATURE.fullmatch(signature) or date[:8] != claim["day"]:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    entry = request.service.credentials.get(claim["key"])
    if entry is None:
        admit(Standing.UNJUDGED, options_of(request))
        return None
    if "x-amz-security-token" in fields:
        raise RefusedError(refusals.SESSION_TOKEN)
    if entry.has_ended(request.now_s):
        raise RefusedError(refusals.ACCESS_KEY_UNKNOWN)
    scope = Scope(claim["day"], claim["region"], SERVICE)
    key = sigv4.signing_key(entry.open().client_secret.encode(), scope)
    if not hmac.compare_digest(sigv4.signature(key, fields["policy"].decode("latin-1")), signature):
        raise RefusedError(refusals.SIGNATURE_MISMATCH)
    return _Signed(policy=fields["policy"], scope=scope, credential=entry)


def _signed_anew(document: dict[str, Any], signed: _Signed, *, has_limits: bool) -> dict[str, bytes]:
    entry, opened = signed.credential, signed.credential.open()
    if opened.session_token is not None:
        raise RefusedError(refusals.CANNOT_SIGN)  # it would have to be a field more, and a condition more
    is_same = entry.upstream_access_key == entry.access_key and opened.upstream_secret is None
    if is_same and not has_limits:
        return {}
    credential = f"{entry.upstream_access_key}/{signed.scope}"
    conditions = [_at_the_service(item, credential) for item in document["conditions"]]
    text = json.dumps({**document, "conditions": conditions}, separators=(",", ":")).encode()
    policy = base64.b64encode(text)
    key = sigv4.signing_key(opened.signs_with, signed.scope)
    return {
        "policy": policy,
        "x-amz-credential": credential.encode(),
        "x-amz-signature": sigv4.signature(key, policy.decode()).encode(),
    }


def _document(encoded: bytes) -> dict[str, Any]:
    """A policy, its keys each once. RefusedError(MALFORMED_DOCUMENT)."""
    if len(encoded) > MAX_POLICY_BYTES:
        raise RefusedError(refusals.TOO_LARGE)
    try:
        text = base64.b64decode(encoded, validate=True)
        document = json.loads(text, object_pairs_hook=_each_once)
    except (binascii.Error, ValueError, RecursionError):
        raise RefusedError(refusals.MALFORMED_DOCUMENT) from None
    if not isinstance(document, dict) or not document.keys() <= {"expiration", "conditions"}:
        raise RefusedError(refusals.MALFORMED_DOCUMENT)
    if not isinstance(document.get("conditions"), list):
        raise RefusedError(refusals.MALFORMED_DOCUMENT)
    return document


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _expiration_s(document: Mapping[str, Any]) -> float:
    try:
        end = datetime.fromisoformat(document["expiration"])
    except (KeyError, TypeError, ValueError):
        raise RefusedError(refusals.MALFORMED_DOCUMENT) from None
    return (end if end.tzinfo is not None else end.replace(tzinfo=UTC)).timestamp()


def _is_range(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and str(item[0]).lower() == _RANGE


def _limits(item: list[Any]) -> tuple[int, int]:
    try:
        _, low, high = item
        limits = int(low), int(high)
    except (TypeError, ValueError):
        raise RefusedError(refusals.MALFORMED_DOCUMENT) from None
    if not 0 <= limits[0] <= limits[1] < PLAIN_LIMIT:
        raise RefusedError(refusals.MALFORMED_DOCUMENT)
    return limits


def _at_the_service(item: Any, credential: str) -> Any:
    """A condition in terms of what the service gets."""
    if _is_range(item):
        low, high = _limits(item)
        return [item[0], sealed_length(low), sealed_length(high)]
    if isinstance(item, dict):
        return {
            name: credential if name.lower() == "x-amz-credential" else value for name, value in item.items()
        }
    if isinstance(item, list) and len(item) == 3 and str(item[1]).lower() == "$x-amz-credential":
        return [item[0], item[1], credential]
    return item
