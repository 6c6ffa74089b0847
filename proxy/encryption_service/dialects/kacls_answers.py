"""What a KACLS answers: one table per kind of error, and the headers that browsers need.

1. An error is one line of {code, message, details}; a tenant's decision is final, an outage may be tried
   again.
2. Every answer to an allowed origin says that it may be read, errors of every layer included; no other does.
3. Nothing is kept by a cache on the way, and `vary` tells it why.
"""

import math
from collections.abc import Mapping
from typing import Final

from envelope.errors import SealgateError
from proxy.encryption_service.call import Answer, Call
from proxy.encryption_service.dialects import kacls_messages as messages
from proxy.encryption_service.dialects.dialect import Trouble
from proxy.encryption_service.dialects.kacls_messages import MalformedError
from proxy.encryption_service.dialects.kacls_policy import Denial, DeniedError
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
from proxy.encryption_service.tokens import KeysUnavailableError

_STALE_RETRY_S: Final = 5


class OriginalKaclsError(SealgateError):
    """The KACLS that is migrated from has not given the key."""

    def __init__(self, status: int, cause: str) -> None:
        super().__init__(cause)
        self.status = status


# One table per kind of error: HTTP status and what is said. `details` is the error's own code.
ANSWER_TO_DENIAL: Final[Mapping[Denial, tuple[int, str]]] = {
    Denial.AUTHENTICATION: (401, "The authentication token is not accepted."),
    Denial.AUTHORIZATION: (403, "The authorization token is not accepted."),
    Denial.USER: (403, "Authentication and authorization are not for the same user."),
    Denial.GUEST: (403, "Guests are not admitted, or not by this identity provider."),
    Denial.ROLE: (403, "The role is not one for this call."),
    Denial.KACLS_URL: (403, "The token is for another KACLS."),
    Denial.OWNER_DOMAIN: (403, "The token is for another owner's domain."),
    Denial.DELEGATION: (403, "The delegation is not for this delegate, resource or call."),
    Denial.PERIMETER: (403, "The perimeter does not admit this user."),
    Denial.ADMIN: (403, "The user may not make this privileged call."),
    Denial.RESOURCE: (403, "The key is of another resource."),
    Denial.SPKI: (403, "The private key is not the one that was authorized."),
    Denial.ORIGINAL_KACLS: (403, "Migration from that KACLS is not allowed."),
}
# A tenant's decision is final (403); an outage may be tried again (503, 429).
ANSWER_TO_ERROR: Final[Mapping[type[SealgateError], tuple[int, str]]] = {
    MalformedError: (400, "The request is not as specified."),
    NotAuthenticated: (403, "The service is not switched on."),
    AccessDenied: (403, "Not allowed."),
    QuotaExceeded: (429, "Too many calls."),
    KeyNotFound: (404, "There is no such key."),
    UsageRefused: (403, "The key is not for this."),
    Revoked: (403, "The key was revoked by its owner."),
    Stale: (503, "The key is not available at the moment."),
    Withdrawn: (503, "This environment is withdrawn; another one serves."),
    DoesNotVerify: (400, "The wrapped key was not made by this KACLS, or was changed."),
    TooLarge: (413, "The request is too large."),
    InputRefused: (400, "The request is not as specified."),
    NotRecorded: (500, "The audit log cannot be written."),
    KeysUnavailableError: (503, "The keys of a token issuer are not available at the moment."),
}
ANSWER_TO_REFUSAL: Final[Mapping[Refusal, tuple[int, str]]] = {
    Refusal.BLOCKED: (403, "The key is blocked."),
    Refusal.NOT_ACTIVE: (403, "The key is not active."),
    Refusal.DEACTIVATED: (403, "The key is deactivated."),
    Refusal.SUSPENDED: (403, "The key is suspended."),
    Refusal.COMPROMISED: (403, "The key is compromised."),
    Refusal.VERSION_GONE: (403, "The key that wrapped this was destroyed."),
    Refusal.VERSION_UNKNOWN: ANSWER_TO_ERROR[DoesNotVerify],
    Refusal.DESTROYED: ANSWER_TO_ERROR[KeyNotFound],
}
ANSWER_TO_TROUBLE: Final[Mapping[Trouble, tuple[int, str]]] = {
    Trouble.NOT_FOUND: (404, "There is no such KACLS or call."),
    Trouble.METHOD: (405, "The call exists, not for this method."),
    Trouble.TOO_LARGE: (413, f"The body exceeds {messages.MAX_BODY_BYTES} bytes."),
    Trouble.MALFORMED_HTTP: (400, "The request is not HTTP as it should be."),
    Trouble.OVERLOAD: (429, "Too many calls at the same time."),
    Trouble.TIMEOUT: (408, "The request came too slowly."),
    Trouble.CRASH: (500, "The service failed."),
    Trouble.STOPPING: (503, "The service is stopping."),
}
ORIGIN_REFUSED: Final = (403, "Pages of this origin may not call.")
EXPECTED: Final = (DeniedError, ServiceError, MalformedError, OriginalKaclsError, KeysUnavailableError)


def status_and_message(error: SealgateError) -> tuple[int, str]:
    match error:
        case DeniedError():
            return ANSWER_TO_DENIAL[error.why]
        case KeyRefused():
            return ANSWER_TO_REFUSAL[error.why]
        case OriginalKaclsError():
            return error.status, "The original KACLS has not given the key."
        case _:
            return ANSWER_TO_ERROR[type(error)]


def code_of(error: SealgateError) -> str:
    """What stands in the audit record, and in `details` unless there is more to say."""
    match error:
        case ServiceError():
            return error_code(error)
        case DeniedError():
            return error.why.value
        case MalformedError():
            return InputRefused.code
        case OriginalKaclsError():
            return "original-kacls"
        case _:
            return "issuer-keys"


def retry_headers(error: SealgateError, status: int) -> tuple[tuple[str, str], ...]:
    if isinstance(error, QuotaExceeded):
        return (("retry-after", str(math.ceil(error.retry_after_s))),)
    return (("retry-after", str(_STALE_RETRY_S)),) if status == 503 else ()


def error_answer(
    status: int,
    message: str,
    details: str,
    *,
    origins: list[str] | str | None = None,
    headers: tuple[tuple[str, str], ...] = (),
) -> Answer:
    if status == 401:
        headers = (*headers, ("www-authenticate", 'Bearer error="invalid_token"'))
    origin = origins if isinstance(origins, str) or origins is None else next(iter(origins), None)
    return answer(status, messages.error_body(status, message, details), origin, headers)


def answer(status: int, body: bytes, origin: str | None, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    return Answer(status=status, body=body, headers=(*headers, *_cross_origin(origin)))


def _cross_origin(origin: str | None) -> tuple[tuple[str, str], ...]:
    """Rule 2. `vary` always: a cache must not give one origin's answer to another."""
    always = (("cache-control", "no-store"), ("x-content-type-options", "nosniff"), ("vary", "origin"))
    if origin is None:
        return always
    return (
        *always,
        ("access-control-allow-origin", origin),
        ("access-control-expose-headers", "retry-after"),
    )


def preflight(method: str, call: Call, origins: list[str]) -> Answer:
    """What a browser asks before it sends. Without an origin it is a plain question for the methods."""
    if not origins:
        return Answer(
            status=204, content_type="", headers=(("allow", f"{method}, OPTIONS"), *_cross_origin(None))
        )
    headers = (
        *_cross_origin(origins[0]),
        ("access-control-allow-methods", "GET, POST, OPTIONS"),
        ("access-control-allow-headers", "content-type"),
        ("access-control-max-age", "600"),
    )
    if "true" in call.values("access-control-request-private-network"):
        # A KACLS is often inside, its callers' page outside: the browser wants that said.
        headers = (*headers, ("access-control-allow-private-network", "true"))
    return Answer(status=204, content_type="", headers=headers)
