"""What the transit dialect says when it does not do what it was asked: the original's status and text.

1. One table from the core's errors, one for the states of a key; the texts of a call that only reads are the
   decryption's, of one that makes something the encryption's.
2. An error that concerns one item of a batch is text alone; `ITEM_ERRORS` are those.
3. A text of ours never repeats more of a request than MAX_ERROR_CHARS.
"""

from collections.abc import Callable
from typing import Final

import msgspec

from proxy.encryption_service.call import Answer
from proxy.encryption_service.dialects.transit_bodies import TOO_OLD, BodyError
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
from proxy.encryption_service.model import OPERATIONS_OF, NamedKey, Op

MAX_ERROR_CHARS: Final = 1024
HEADERS: Final = (("cache-control", "no-store"),)

UNSUPPORTED_PATH: Final = "1 error occurred:\n\t* unsupported path\n\n"
UNSUPPORTED_OPERATION: Final = "1 error occurred:\n\t* unsupported operation\n\n"
DENIED: Final = "1 error occurred:\n\t* permission denied\n\n"
AGENT_ALONE: Final = "keys are made, rotated, configured and deleted by the enterprise's key agent alone"
SOFT_DELETED: Final = "refusing to use soft-deleted key"

ITEM_ERRORS: Final = (BodyError, DoesNotVerify, KeyRefused, InputRefused, TooLarge)
"""Within a batch these concern one item (rule 2)."""

_MAKING: Final = frozenset({Op.ENCRYPT, Op.GENERATE, Op.SIGN})
_NOT_FOUND: Final = {
    Op.SIGN: "signing key not found",
    Op.VERIFY: "signature verification key not found",
}
_UNFIT: Final = {
    Op.ENCRYPT: "message encryption not supported for key type {}",
    Op.GENERATE: "message encryption not supported for key type {}",
    Op.DECRYPT: "message decryption not supported for key type {}",
    Op.REWRAP: "message decryption not supported for key type {}",
    Op.SIGN: "key type {} does not support signing",
    Op.VERIFY: "key type {} does not support verification",
}


class VaultError(Exception):
    """Ends a call with `{"errors": [...]}`."""

    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(status)
        self.status = status
        self.errors = errors


def answer_for(
    error: ServiceError, op: Op | None, key: NamedKey | None, key_type: Callable[[NamedKey], str]
) -> Answer:
    """What a call is answered that *error* has ended; *op* and *key* as far as they were known by then."""
    match error:
        case NotAuthenticated():
            return errors(403, "permission denied")
        case AccessDenied():
            return errors(403, DENIED)
        case QuotaExceeded():
            return errors(429, f"rate limit quota exceeded: {error}", retry_after_s=error.retry_after_s)
        case KeyNotFound():
            return errors(400, _NOT_FOUND.get(op or Op.ENCRYPT, "encryption key not found"))
        case UsageRefused() if op is not None and key is not None and op not in OPERATIONS_OF[key.use]:
            return errors(400, _UNFIT[op].format(key_type(key)))
        case UsageRefused():
            return errors(403, DENIED, "the key is not for this operation")
        case Revoked():
            return errors(503, "Vault is sealed")
        case Withdrawn():
            return errors(503, "this environment is withdrawn; retry: another one serves", retry_after_s=2)
        case Stale():
            return errors(503, "no valid key is here at the moment: the key agent is late; retry")
        case NotRecorded():
            return errors(500, "failed to audit response; cannot continue")
        case TooLarge():
            return errors(413, "http: request body too large")
        case _:
            return errors(400, item_text(error, op))


def item_text(error: Exception, op: Op | None) -> str:
    """The text of one of ITEM_ERRORS."""
    match error:
        case BodyError():
            return error.text[:MAX_ERROR_CHARS]
        case DoesNotVerify():
            return "cipher: message authentication failed"
        case KeyRefused():
            return _state_text(error.why, op)
        case _:
            return str(error)[:MAX_ERROR_CHARS]


def _state_text(why: Refusal, op: Op | None) -> str:
    signs = op in {Op.SIGN, Op.VERIFY}
    if op in _MAKING:
        noun = "signing" if signs else "encryption"
        match why:
            case Refusal.VERSION_UNKNOWN:
                return f"requested version for {noun} is higher than the latest key version"
            case Refusal.DEACTIVATED | Refusal.VERSION_GONE:
                return f"requested version for {noun} is less than the minimum encryption key version"
            case _:
                return SOFT_DELETED
    match why:
        case Refusal.VERSION_UNKNOWN:
            return f"invalid {'signature' if signs else 'ciphertext'}: version is too new"
        case Refusal.VERSION_GONE | Refusal.DESTROYED:
            return TOO_OLD
        case _:
            return SOFT_DELETED


def errors(status: int, *texts: str, retry_after_s: float | None = None) -> Answer:
    """`{"errors": [...]}`, on one line."""
    # What was received may be no text: a path is repeated in one of these.
    clean = [text[:MAX_ERROR_CHARS].encode("utf-8", "replace").decode() for text in texts]
    body = msgspec.json.encode({"errors": clean}) + b"\n"
    headers: tuple[tuple[str, str], ...] = HEADERS
    if retry_after_s is not None:
        headers = (*headers, ("retry-after", str(max(1, -int(-retry_after_s // 1)))))
    return Answer(status=status, body=body, headers=headers)
