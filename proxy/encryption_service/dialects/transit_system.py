"""What Vault's clients ask beside the keys: is it sealed, what is my token.

1. Health needs no token. With one it is of the token's tenant; without, of the one tenant there is, or where
   there are several, of the process.
2. A token is a credential: it is not renewed but rotated by the administrator, and not repeated in an answer.
"""

from collections.abc import Callable
from typing import Any, Final
from urllib.parse import parse_qsl

from proxy.encryption_service.access import Caller
from proxy.encryption_service.call import Answer, Call
from proxy.encryption_service.dialects.bearer import BearerCalls, Work
from proxy.encryption_service.dialects.transit_bodies import NoBody, Reader
from proxy.encryption_service.dialects.transit_call import (
    TOKEN_HEADER,
    WRITING,
    TransitRequest,
    headers_of,
    json_answer,
    success,
    token_of,
)
from proxy.encryption_service.dialects.transit_errors import DENIED, UNSUPPORTED_OPERATION, VaultError
from proxy.encryption_service.dialects.transit_keys import rfc3339
from proxy.encryption_service.errors import NotAuthenticated
from proxy.encryption_service.key_states import Standing
from proxy.encryption_service.model import DialectName, ServiceDirectory

HEALTH_CALLS: Final = frozenset({"health", "seal-status", "leader", "init"})
"""Below `sys/`."""
VERSION: Final = "0.1.0+sealgate"
"""In health answers; a semantic version, as clients parse it."""


class SystemCalls:
    """`sys/...` and `auth/token/...`."""

    def __init__(self, calls: BearerCalls, directory: Callable[[], ServiceDirectory]) -> None:
        self._calls = calls
        self._core = calls.core
        self._clock = calls.clock
        self._directory = directory
        self._increment_body = Reader(NoBody, max_items=1)

    def token_call(self, request: TransitRequest, what: str) -> Answer:
        caller, method = request.caller, request.call.method
        request.work.operation = f"token-{what}"[:64]
        if what == "lookup-self" and method in {"GET", *WRITING}:
            self._calls.record(request.work)
            return success(request, self._token_facts(caller))
        if what == "renew-self" and method in WRITING:
            self._increment_body.read(request.call.body)
            raise VaultError(400, "lease is not renewable")
        if what in {"lookup-self", "renew-self"}:
            raise VaultError(405, UNSUPPORTED_OPERATION)
        raise VaultError(403, DENIED)

    def _token_facts(self, caller: Caller) -> dict[str, Any]:
        """Of the credential; the token itself is not repeated."""
        entry = self._directory().credentials.get(caller.credential_id or "")
        if entry is None:
            raise NotAuthenticated
        left_s = 0 if entry.not_after_s is None else max(0, int(entry.not_after_s - self._clock.wall_s()))
        return {
            "accessor": entry.id,
            "creation_time": entry.created_at_s,
            "creation_ttl": 0 if entry.not_after_s is None else int(entry.not_after_s - entry.created_at_s),
            "display_name": entry.label,
            "entity_id": "",
            "expire_time": None if entry.not_after_s is None else rfc3339(entry.not_after_s),
            "explicit_max_ttl": 0,
            "id": entry.id,
            "issue_time": rfc3339(entry.created_at_s),
            "meta": {"tenant": entry.tenant},
            "num_uses": 0,
            "orphan": True,
            "path": "auth/token/create",
            "policies": ["sealgate"],
            "renewable": False,
            "ttl": left_s,
            "type": "service",
        }

    def health(self, call: Call, work: Work, what: str) -> Answer:
        """Without a token too: then of the one tenant there is, or of the process."""
        work.operation = what
        if call.method not in {"GET", "HEAD"}:
            raise VaultError(405)
        standing = self._standing_for(call, work)
        sealed = standing in {Standing.REVOKED, Standing.STALE}
        if what == "init":
            return json_answer(200, {"initialized": True})
        if what == "leader":
            return json_answer(200, {"ha_enabled": False, "is_self": False, "leader_address": ""})
        if what == "seal-status":
            return json_answer(200, _seal_status(sealed=sealed))
        status = _health_status(call.query, sealed=sealed)
        document = {
            "initialized": True,
            "sealed": sealed,
            "standby": False,
            "performance_standby": False,
            "replication_performance_mode": "disabled",
            "replication_dr_mode": "disabled",
            "server_time_utc": int(self._clock.wall_s()),
            "version": VERSION,
        }
        return json_answer(status, document, empty=call.method == "HEAD")

    def _standing_for(self, call: Call, work: Work) -> Standing:
        headers = headers_of(call)
        directory = self._directory()
        if headers.get(TOKEN_HEADER) or "authorization" in headers:
            try:
                caller = self._calls.authenticate(work, token_of(headers), call)
                return self._core.states.standing(caller.tenant)
            except NotAuthenticated:
                pass  # a wrong token learns as much as none
        tenants = [
            tenant
            for (tenant, dialect), entry in directory.dialects.items()
            if dialect is DialectName.TRANSIT and entry.enabled
        ]
        return self._core.states.standing(tenants[0]) if len(tenants) == 1 else Standing.SERVING


def _health_status(query: str, *, sealed: bool) -> int:
    """200, or 503 when sealed, unless the query says otherwise. VaultError for a code that is none."""
    asked = dict(parse_qsl(query, keep_blank_values=True))
    codes = {"activecode": 200, "sealedcode": 503, "standbycode": 429, "uninitcode": 501}
    for name in codes:
        text = asked.get(name, "")
        if not text:
            continue
        if not (text.isascii() and text.isdecimal() and len(text) == 3 and 200 <= int(text) <= 599):
            raise VaultError(400)
        codes[name] = int(text)
    return codes["sealedcode" if sealed else "activecode"]


def _seal_status(*, sealed: bool) -> dict[str, Any]:
    """For `bao status`: one share, the enterprise's."""
    return {
        "type": "sealgate",
        "initialized": True,
        "sealed": sealed,
        "t": 1,
        "n": 1,
        "progress": 0,
        "nonce": "",
        "version": VERSION,
        "build_date": "",
        "migration": False,
        "recovery_seal": True,
        "storage_type": "memory",
    }
