"""Refusals in the words of Google's JSON API: an error with a reason that its clients know.

1. The status is the refusal's: clients decide by it whether to try again.
2. What the client sent stands in no error.
"""

import json
from collections.abc import Mapping
from typing import Final

from proxy.refusals import Refusal

CONTENT_TYPE: Final = "application/json; charset=UTF-8"
# https://cloud.google.com/storage/docs/json_api/v1/status-codes
_REASONS: Final[Mapping[int, str]] = {
    400: "invalid",
    401: "required",
    403: "forbidden",
    404: "notFound",
    409: "conflict",
    410: "uploadBrokenConnection",
    411: "required",
    412: "conditionNotMet",
    413: "uploadTooLarge",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
    501: "notImplemented",
    503: "backendError",
}


def error_document(refusal: Refusal) -> bytes:
    message = f"{refusal.cause} {refusal.next_step}"
    reason = _REASONS.get(refusal.status, "backendError" if refusal.status >= 500 else "invalid")
    error = {
        "code": refusal.status,
        "message": message,
        "errors": [{"message": message, "domain": "global", "reason": reason}],
        "sealgateError": refusal.code,
    }
    return json.dumps({"error": error}).encode()
