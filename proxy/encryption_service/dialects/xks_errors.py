"""What XKS answers when it does not do what it was asked (specification 1.0.3, "Error Codes").

1. One table says with which status an error's name goes; one, which of our errors has which name. What stands
   in none is InternalException.
2. An outage may be tried again (429, 500, 503); what somebody decided is final (400, 403, 404).
3. An answer is one line of JSON, whatever layer it comes from: AWS KMS cannot read anything else. Its text
   has less than 512 characters of 0x20 to 0x7E.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec

from envelope.errors import SealgateError
from proxy.encryption_service.call import Answer
from proxy.encryption_service.dialects import xks_messages as messages
from proxy.encryption_service.dialects.dialect import Trouble
from proxy.encryption_service.errors import (
    AccessDenied,
    DoesNotVerify,
    InputRefused,
    KeyNotFound,
    KeyRefused,
    NotAuthenticated,
    NotRecorded,
    QuotaExceeded,
    Refusal,
    Revoked,
    ServiceError,
    Stale,
    TooLarge,
    UsageRefused,
    Withdrawn,
)
from proxy.encryption_service.recording import error_code

MAX_BODY_BYTES: Final = 128 << 10
MAX_MESSAGE_LENGTH: Final = 511
_UNPRINTABLE: Final = re.compile(r"[^\x20-\x7e]")


class CipherFailedError(SealgateError):
    """What was encrypted does not decrypt, or the trial of the cipher failed: nothing of it may leave."""


class ErrorName(StrEnum):
    """The specification's errors; `STATUS` says with which HTTP status."""

    VALIDATION = "ValidationException"
    INVALID_STATE = "InvalidStateException"
    INVALID_CIPHERTEXT = "InvalidCiphertextException"
    INVALID_KEY_USAGE = "InvalidKeyUsageException"
    AUTHENTICATION_FAILED = "AuthenticationFailedException"
    ACCESS_DENIED = "AccessDeniedException"
    KEY_NOT_FOUND = "KeyNotFoundException"
    INVALID_URI_PATH = "InvalidUriPathException"
    THROTTLING = "ThrottlingException"
    INTERNAL = "InternalException"
    UNSUPPORTED = "UnsupportedOperationException"
    DEPENDENCY_TIMEOUT = "DependencyTimeoutException"


STATUS: Final[Mapping[ErrorName, int]] = {
    ErrorName.VALIDATION: 400,
    ErrorName.INVALID_STATE: 400,
    ErrorName.INVALID_CIPHERTEXT: 400,
    ErrorName.INVALID_KEY_USAGE: 400,
    ErrorName.AUTHENTICATION_FAILED: 401,
    ErrorName.ACCESS_DENIED: 403,
    ErrorName.KEY_NOT_FOUND: 404,
    ErrorName.INVALID_URI_PATH: 404,
    ErrorName.THROTTLING: 429,
    ErrorName.INTERNAL: 500,
    ErrorName.UNSUPPORTED: 501,
    ErrorName.DEPENDENCY_TIMEOUT: 503,
}

ERROR_OF: Final[Mapping[type[SealgateError], ErrorName]] = {
    messages.ValidationError: ErrorName.VALIDATION,
    messages.CiphertextError: ErrorName.INVALID_CIPHERTEXT,
    messages.SizeError: ErrorName.UNSUPPORTED,
    NotAuthenticated: ErrorName.AUTHENTICATION_FAILED,
    AccessDenied: ErrorName.ACCESS_DENIED,
    QuotaExceeded: ErrorName.THROTTLING,
    KeyNotFound: ErrorName.KEY_NOT_FOUND,
    UsageRefused: ErrorName.INVALID_KEY_USAGE,
    Revoked: ErrorName.INVALID_STATE,
    Stale: ErrorName.DEPENDENCY_TIMEOUT,
    Withdrawn: ErrorName.DEPENDENCY_TIMEOUT,
    DoesNotVerify: ErrorName.INVALID_CIPHERTEXT,
    TooLarge: ErrorName.UNSUPPORTED,
    InputRefused: ErrorName.VALIDATION,
    NotRecorded: ErrorName.INTERNAL,
    CipherFailedError: ErrorName.INTERNAL,
}
REFUSALS: Final = (
    ServiceError,
    messages.ValidationError,
    messages.CiphertextError,
    messages.SizeError,
    CipherFailedError,
)
"""What a call may end with; everything else is a bug."""
_CODE_OF: Final[Mapping[type[SealgateError], str]] = {
    messages.ValidationError: "input-refused",
    messages.CiphertextError: "does-not-verify",
    messages.SizeError: "too-large",
    CipherFailedError: "cipher-failed",
}
"""In the words of the other dialects' audit records."""

ERROR_OF_REFUSAL: Final[Mapping[Refusal, ErrorName]] = {
    Refusal.BLOCKED: ErrorName.INVALID_STATE,
    Refusal.NOT_ACTIVE: ErrorName.INVALID_STATE,
    Refusal.DEACTIVATED: ErrorName.INVALID_KEY_USAGE,
    Refusal.SUSPENDED: ErrorName.INVALID_STATE,
    Refusal.COMPROMISED: ErrorName.INVALID_STATE,
    Refusal.VERSION_GONE: ErrorName.INVALID_STATE,
    Refusal.VERSION_UNKNOWN: ErrorName.INVALID_CIPHERTEXT,
    Refusal.DESTROYED: ErrorName.KEY_NOT_FOUND,
}

# What the HTTP layer has to say. 405 and 413 are not in the specification's table.
ANSWER_TO: Final[Mapping[Trouble, tuple[int, ErrorName, str]]] = {
    Trouble.NOT_FOUND: (404, ErrorName.INVALID_URI_PATH, "the URI path is not valid"),
    Trouble.METHOD: (405, ErrorName.VALIDATION, "the method must be POST"),
    Trouble.TOO_LARGE: (413, ErrorName.VALIDATION, f"the body exceeds {MAX_BODY_BYTES} bytes"),
    Trouble.MALFORMED_HTTP: (400, ErrorName.VALIDATION, "the request is not HTTP as it should be"),
    Trouble.OVERLOAD: (429, ErrorName.THROTTLING, "the proxy is unable to keep up"),
    Trouble.TIMEOUT: (408, ErrorName.VALIDATION, "the request came too slowly"),
    Trouble.CRASH: (500, ErrorName.INTERNAL, "the proxy failed"),
    Trouble.STOPPING: (503, ErrorName.DEPENDENCY_TIMEOUT, "the proxy is stopping"),
}


class ErrorBody(msgspec.Struct, frozen=True, rename="camel", gc=False):
    error_name: str
    error_message: str


def error_name(error: SealgateError) -> ErrorName:
    """By the tables; what stands in none is InternalException."""
    if isinstance(error, KeyRefused):
        return ERROR_OF_REFUSAL[error.why]
    return ERROR_OF.get(type(error), ErrorName.INTERNAL)


def code_of(error: SealgateError) -> str:
    """For the audit record; of *error*, one of REFUSALS."""
    return error_code(error) if isinstance(error, ServiceError) else _CODE_OF[type(error)]


def error_answer(
    name: ErrorName,
    message: str,
    *,
    status: int | None = None,
    headers: tuple[tuple[str, str], ...] = (),
) -> Answer:
    """One line of JSON; *message* as the specification wants it: below 512 characters, 0x20 to 0x7E."""
    text = _UNPRINTABLE.sub("?", message)[:MAX_MESSAGE_LENGTH]
    body = msgspec.json.encode(ErrorBody(name, text))
    return Answer(status=STATUS[name] if status is None else status, body=body, headers=headers)
