"""Refusals in the words of S3: an XML document with a code that its clients know.

1. The status is the refusal's. The code is S3's nearest: clients decide by it whether to try again.
2. What the client sent stands in no error but for the path it asked for.
"""

from collections.abc import Mapping
from typing import Final
from xml.sax.saxutils import escape

from proxy import refusals
from proxy.messages.message import RequestHead
from proxy.refusals import Refusal

CONTENT_TYPE: Final = "application/xml"
_MAX_RESOURCE: Final = 1024
_BY_STATUS: Final[Mapping[int, str]] = {
    400: "InvalidRequest",
    403: "AccessDenied",
    405: "MethodNotAllowed",
    409: "OperationAborted",
    410: "NoSuchKey",
    411: "MissingContentLength",
    412: "PreconditionFailed",
    413: "EntityTooLarge",
    416: "InvalidRange",
    421: "InvalidRequest",
    423: "AccessDenied",
    429: "SlowDown",
    501: "NotImplemented",
    502: "InternalError",
    503: "ServiceUnavailable",
}
CODES: Final[Mapping[str, str]] = {
    refusals.BAD_DIGEST.code: "BadDigest",
    refusals.INVALID_DIGEST.code: "InvalidDigest",
    refusals.PAYLOAD_MISMATCH.code: "XAmzContentSHA256Mismatch",
    refusals.BAD_LENGTH.code: "IncompleteBody",
    refusals.SIGNATURE_MISMATCH.code: "SignatureDoesNotMatch",
    refusals.ACCESS_KEY_UNKNOWN.code: "InvalidAccessKeyId",
    refusals.REQUEST_SKEWED.code: "RequestTimeTooSkewed",
    refusals.AUTHORIZATION_MALFORMED.code: "AuthorizationHeaderMalformed",
    refusals.SESSION_TOKEN.code: "InvalidToken",
    refusals.NOT_SEALED.code: "InvalidObjectState",
    refusals.MALFORMED_DOCUMENT.code: "MalformedXML",
    refusals.PART_UNKNOWN.code: "InvalidPart",
    refusals.PART_NOT_THERE.code: "InvalidPartNumber",
    refusals.PART_ORDER.code: "InvalidPartOrder",
    refusals.PART_TOO_SMALL.code: "EntityTooSmall",
    refusals.PART_NUMBER.code: "InvalidArgument",
    refusals.COPY_SOURCE.code: "InvalidArgument",
    refusals.CONTENT_TOO_LARGE.code: "EntityTooLarge",
    refusals.CONTENT_TOO_SMALL.code: "EntityTooSmall",
    refusals.UPLOADS_FULL.code: "SlowDown",
}
"""Where the code of the status would not do."""


def s3_code(refusal: Refusal) -> str:
    return CODES.get(refusal.code) or _BY_STATUS.get(refusal.status, "InternalError")


def error_document(refusal: Refusal, head: RequestHead) -> bytes:
    """`Error` as S3 makes it, with our own code in `SealgateError`."""
    path = head.target.partition("?")[0][:_MAX_RESOURCE]
    shown = path.encode("utf-8", "replace").decode()
    shown = "".join(letter if letter.isprintable() else "?" for letter in shown)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Error>'
        f"<Code>{s3_code(refusal)}</Code>"
        f"<Message>{escape(refusal.cause)} {escape(refusal.next_step)}</Message>"
        f"<Resource>{escape(shown)}</Resource>"
        f"<SealgateError>{escape(refusal.code)}</SealgateError>"
        "</Error>"
    ).encode()
