"""Refusals in the words of Azure Storage: an XML document with a code that its clients know.

1. The status is the refusal's. The code is Azure's nearest: by both clients decide what to raise and whether
   to try again. So those codes that say `try again` (InternalError, OperationTimedOut, ServerBusy) stand
   beside statuses that say so, and no others do.
2. The code stands in the head, too (`x-ms-error-code`): an answer to a HEAD has no document.
3. What the client sent stands in no error.
"""

from collections.abc import Mapping
from typing import Final
from xml.sax.saxutils import escape

from proxy import refusals
from proxy.refusals import Refusal, Shaped

CONTENT_TYPE: Final = "application/xml"
ERROR_CODE: Final = "x-ms-error-code"
_BY_STATUS: Final[Mapping[int, str]] = {
    400: "InvalidInput",
    403: "AuthorizationFailure",
    404: "ResourceNotFound",
    409: "InvalidOperation",
    410: "ResourceNotFound",
    411: "MissingContentLengthHeader",
    412: "ConditionNotMet",
    413: "RequestBodyTooLarge",
    415: "UnsupportedHeader",
    416: "InvalidRange",
    421: "InvalidUri",
    423: "AuthorizationFailure",
    429: "ServerBusy",
    501: "FeatureNotSupportedByProxy",
    502: "InternalError",
    503: "ServerBusy",
    504: "OperationTimedOut",
}
CODES: Final[Mapping[str, str]] = {
    refusals.BAD_DIGEST.code: "Md5Mismatch",
    refusals.BAD_CHECKSUM.code: "Crc64Mismatch",
    refusals.INVALID_DIGEST.code: "InvalidHeaderValue",
    refusals.SIGNATURE_MISMATCH.code: "AuthenticationFailed",
    refusals.ACCESS_KEY_UNKNOWN.code: "AuthenticationFailed",
    refusals.REQUEST_SKEWED.code: "AuthenticationFailed",
    refusals.AUTHORIZATION_MALFORMED.code: "InvalidAuthenticationInfo",
    refusals.SHARED_KEY_LITE.code: "InvalidAuthenticationInfo",
    refusals.ANONYMOUS.code: "NoAuthenticationInformation",
    refusals.MALFORMED_DOCUMENT.code: "InvalidXmlDocument",
    refusals.BLOCK_ID.code: "InvalidQueryParameterValue",
    refusals.BLOCK_UNKNOWN.code: "InvalidBlockList",
    refusals.BLOCKS_OF_A_COPY.code: "InvalidBlockList",
    refusals.COPY_SOURCE.code: "InvalidHeaderValue",
}
"""Where the code of the status would not do."""


def azure_code(refusal: Refusal) -> str:
    named = CODES.get(refusal.code) or _BY_STATUS.get(refusal.status)
    return named or ("InvalidInput" if refusal.status < 500 else "InternalError")


def shaped(refusal: Refusal) -> Shaped:
    return Shaped(
        content_type=CONTENT_TYPE,
        body=error_document(refusal),
        fields=((ERROR_CODE, azure_code(refusal)),),
    )


def error_document(refusal: Refusal) -> bytes:
    """`Error` as Azure makes it, with our own code in `SealgateError`."""
    return (
        '<?xml version="1.0" encoding="utf-8"?><Error>'
        f"<Code>{azure_code(refusal)}</Code>"
        f"<Message>{escape(refusal.cause)} {escape(refusal.next_step)}</Message>"
        f"<SealgateError>{escape(refusal.code)}</SealgateError>"
        "</Error>"
    ).encode()
