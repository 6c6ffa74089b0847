"""What the native API says when it does not do what it was asked: problem documents (RFC 9457), one table.

1. `code` is stable, `detail` names the cause, `next_step` says what to do about it.
2. 403, 404, 409, 410, 422 and 423 are final until somebody acts; 429 and 503 carry Retry-After and are worth
   another try.
3. A key's state has a status of its own: unknown 404, destroyed 410, forbidden by somebody 423, else 409.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

from proxy.encryption_service.call import Answer
from proxy.encryption_service.dialects.dialect import Trouble
from proxy.encryption_service.dialects.native_bodies import Problem
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

PROBLEM_JSON: Final = "application/problem+json"
HEADERS: Final = (("cache-control", "no-store"),)
_ADMIN: Final = "Ask the tenant's administrator."
_TITLES: Final = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    423: "Locked",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Row(NamedTuple):
    status: int
    code: str
    detail: str
    next_step: str
    retry_after_s: int | None = None


MALFORMED: Final = Row(
    400, "malformed", "The request is not what this call takes.", "Compare it with /openapi.json."
)
NOT_FOUND: Final = Row(404, "not-found", "There is nothing at this path.", "Check it against /openapi.json.")
METHOD: Final = Row(405, "method-not-allowed", "Not with this method.", "Use a method of the Allow header.")
MEDIA_TYPE: Final = Row(
    415, "unsupported-media-type", "The body is not declared as JSON.", "Send Content-Type: application/json."
)
SEALED_OBJECT: Final = Row(
    422,
    "does-not-verify",
    "The object is damaged, incomplete, or was not sealed with this key and name.",
    "Compare key and Sealgate-Name with those it was sealed with.",
)

TOKEN_REFUSED: Final = Row(
    422, "token-refused", "The token is not one to be believed.", "Have the user log in again."
)
TOO_MANY_KEYS: Final = Row(
    422,
    "too-many-keys",
    "None of the keys that may be tried has made it, and there are more.",
    "Name its key_id or its ring.",
)


class RefusedError(Exception):
    """Ends a call with this row of the table."""

    def __init__(self, row: Row, detail: str = "", *, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(row.code)
        self.row = row
        self.detail = detail
        self.headers = headers


_ROWS: Final[dict[type[ServiceError], Row]] = {
    NotAuthenticated: Row(
        401, "not-authenticated", "No valid token came with the call.", "Send Authorization: Bearer <token>."
    ),
    AccessDenied: Row(403, "access-denied", "The credential is not for this.", _ADMIN),
    QuotaExceeded: Row(
        429, "quota", "More calls than agreed.", "Call again after the time in Retry-After.", 1
    ),
    KeyNotFound: Row(404, "key-not-found", "There is no such key.", "List the keys: GET /sealgate/v1/keys."),
    KeyRefused: Row(409, "key-refused", "The state of the key does not allow this.", _ADMIN),
    Withdrawn: Row(
        503, "env-healing", "This environment is withdrawn: another one serves.", "Try again shortly.", 2
    ),
    UsageRefused: Row(409, "usage-refused", "The key is not for this operation.", "Use another key."),
    Revoked: Row(
        403,
        "revoked",
        "The enterprise has withdrawn its keys.",
        "Do not retry: only the enterprise can bring them back.",
    ),
    Stale: Row(
        503, "stale", "No valid key is here: the enterprise's key agent is late.", "Try again shortly.", 5
    ),
    DoesNotVerify: Row(
        422,
        "does-not-verify",
        "This key, with this aad and context, has not made it, or it was changed.",
        "Compare key, aad and context with those it was made with.",
    ),
    TooLarge: Row(413, "too-large", "More than one call takes.", "Use /seal and /open for large bodies."),
    InputRefused: Row(400, "input-refused", "A parameter does not fit the key.", "Describe the key first."),
    NotRecorded: Row(
        500, "not-recorded", "The call cannot be recorded, so it is not answered.", "Tell the operator."
    ),
}
# What is gone for good, what does not exist, what somebody has forbidden; 409 is the rest.
_STATUS_OF_REFUSAL: Final[Mapping[Refusal, int]] = {
    Refusal.VERSION_UNKNOWN: 404,
    Refusal.VERSION_GONE: 410,
    Refusal.DESTROYED: 410,
    Refusal.SUSPENDED: 423,
    Refusal.COMPROMISED: 423,
    Refusal.BLOCKED: 423,
}
_TROUBLES: Final = {
    Trouble.NOT_FOUND: NOT_FOUND,
    Trouble.METHOD: METHOD,
    Trouble.TOO_LARGE: _ROWS[TooLarge],
    Trouble.MALFORMED_HTTP: Row(400, "malformed", "This is not HTTP as it should be.", "Mend the client."),
    Trouble.OVERLOAD: Row(429, "overload", "Too many calls at once.", "Try again after a moment.", 1),
    Trouble.TIMEOUT: Row(408, "timeout", "The request came too slowly.", "Try again."),
    Trouble.STOPPING: Row(503, "stopping", "This server is stopping.", "Try again.", 1),
    Trouble.CRASH: Row(500, "internal", "The server failed.", "Tell the operator; then try again."),
}


def row_of(error: ServiceError) -> Row:
    """The table's row, with the error's own cause where it says more."""
    row = _ROWS.get(type(error), _TROUBLES[Trouble.CRASH])
    match error:
        case KeyRefused():
            status = _STATUS_OF_REFUSAL.get(error.why, row.status)
            return row._replace(status=status, code=f"key-{error.why}", detail=f"{error}."[:512])
        case QuotaExceeded():
            return row._replace(
                detail=f"{error}."[:512], retry_after_s=max(1, -int(-error.retry_after_s // 1))
            )
        case AccessDenied() | InputRefused() | UsageRefused():
            return row._replace(detail=f"{error}."[:512])
    return row


def row_of_trouble(trouble: Trouble) -> Row:
    return _TROUBLES.get(trouble, _TROUBLES[Trouble.CRASH])


def problem(row: Row, *, detail: str = "", headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """The answer, on one line."""
    document = Problem(
        title=_TITLES[row.status],
        status=row.status,
        code=row.code,
        detail=detail or row.detail,
        next_step=row.next_step,
    )
    headers = (*HEADERS, *headers)
    if row.retry_after_s is not None:
        headers = (*headers, ("retry-after", str(row.retry_after_s)))
    if row.status == 401:
        headers = (*headers, ("www-authenticate", 'Bearer realm="sealgate"'))
    body = msgspec.json.encode(document) + b"\n"
    return Answer(status=row.status, body=body, content_type=PROBLEM_JSON, headers=headers)
