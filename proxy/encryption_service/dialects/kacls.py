"""Google Workspace client-side encryption: a KACLS (docs/encryption-service-kacls.md).

1. The path of a KACLS's base URL is its tenant; behind it stands one call's name. Nothing is decoded or
   normalised.
2. Browsers call: OPTIONS is answered without tokens, and every answer to an allowed origin, errors of every
   layer included, says that it may be read. A page of another origin is refused, whatever tokens it has.
3. Every call that names a person or a key leaves an audit record; `/status` and `/certs` are public and do
   not. Of calls by strangers some are recorded (`Strangers`).
4. `handle` is synchronous whenever the issuers' keys are at hand. Where they are not, nothing has been done
   yet: they are fetched, and the call begins anew, as the tenant is set up by then. `/rewrap` waits for the
   other KACLS, and is refused if the tenant's settings have changed meanwhile.
"""

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, override

from envelope.errors import SealgateError
from proxy.encryption_service.call import Answer, Call
from proxy.encryption_service.core import Core, Outcome
from proxy.encryption_service.dialects import kacls_messages as messages
from proxy.encryption_service.dialects.dialect import Dialect, Trouble
from proxy.encryption_service.dialects.kacls_answers import (
    ANSWER_TO_ERROR,
    ANSWER_TO_TROUBLE,
    EXPECTED,
    ORIGIN_REFUSED,
    code_of,
    error_answer,
    preflight,
    retry_headers,
    status_and_message,
)
from proxy.encryption_service.dialects.kacls_calls import PUBLIC, Exchange, KaclsCalls, Served
from proxy.encryption_service.dialects.kacls_endpoint import Kacls
from proxy.encryption_service.dialects.kacls_messages import MalformedError
from proxy.encryption_service.dialects.kacls_policy import DeniedError
from proxy.encryption_service.errors import NotRecorded, QuotaExceeded
from proxy.encryption_service.limits import Limiter
from proxy.encryption_service.model import DialectName, ServiceDirectory, url_path
from proxy.encryption_service.strangers import Strangers
from proxy.encryption_service.tokens import KeysNeededError, KeySource, KeysUnavailableError
from runtime.clock import Clock

PATH: Final = "/kacls/"
"""Paths below it are always ours, so that an unknown one is answered in this dialect's shape."""
MAX_FETCHES: Final = 4
"""Of key sets, in one call: two tokens, each perhaps of a set that is new and one that is old."""


class IssuerKeys(KeySource, Protocol):
    """Key sets by URL, as `proxy.encryption_service.jwks.KeySets` keeps them."""

    async def refresh(self, url: str, *, patient: bool) -> None:
        """Fetch the set at *url*."""


class KaclsDialect(Dialect):
    """`/<path>/status`, `/wrap`, `/unwrap` and the others, for every KACLS of the directory."""

    name = DialectName.KACLS
    max_body_bytes = messages.MAX_BODY_BYTES

    def __init__(
        self,
        *,
        core: Core,
        limiter: Limiter,
        directory: Callable[[], ServiceDirectory],
        clock: Clock,
        issuer_keys: IssuerKeys,
        post: Callable[[str, bytes], Awaitable[tuple[int, bytes]]],
    ) -> None:
        """*post*: an HTTPS request with a JSON body, answered by status and body; OutboundError."""
        self._core = core
        self._limiter = limiter
        self._directory = directory
        self._clock = clock
        self._issuer_keys = issuer_keys
        self._calls: Final = KaclsCalls(
            core=core,
            limiter=limiter,
            clock=clock,
            issuer_keys=issuer_keys,
            post=post,
            is_current=lambda kacls: self._at(f"{url_path(kacls.url)}/") == kacls,
        )
        self._strangers: Final = Strangers(clock)
        self._seen = directory()
        self._kacls: dict[str, Kacls] = {}

    # The border.

    @override
    def claims(self, path: str) -> bool:
        return path.startswith(PATH) or self._at(path) is not None

    @override
    def handle(self, call: Call) -> Served:
        kacls, operation = self._found(call)
        if kacls is None:
            return self.refuse(Trouble.NOT_FOUND, call)
        origins = call.values("origin")
        if any(origin not in kacls.origins for origin in origins) or len(origins) > 1:
            return error_answer(*ORIGIN_REFUSED, "origin")
        if operation not in self._calls.operations:
            return self.refuse(Trouble.NOT_FOUND, call)
        method, _serve = self._calls.operations[operation]
        if call.method == "OPTIONS":
            return preflight(method, call, origins)
        if call.method != method:
            return self.refuse(Trouble.METHOD, call)
        if method == "POST" and not _is_json(call):
            return error_answer(415, "The body has to be application/json.", "content-type", origins=origins)
        try:
            return self._serve(kacls, operation, call)
        except KeysNeededError as needed:
            return self._serve_later(kacls, operation, call, needed)

    @override
    def refuse(self, trouble: Trouble, call: Call | None, detail: str = "") -> Answer:
        status, message = ANSWER_TO_TROUBLE[trouble]
        headers: tuple[tuple[str, str], ...] = ()
        origins: list[str] = []
        if call is not None:
            kacls, operation = self._found(call)
            if kacls is not None:
                origins = [origin for origin in call.values("origin") if origin in kacls.origins]
            if trouble is Trouble.METHOD and operation in self._calls.operations:
                headers = (("allow", f"{self._calls.operations[operation][0]}, OPTIONS"),)
        return error_answer(status, message, detail or trouble.value, origins=origins, headers=headers)

    def _found(self, call: Call) -> tuple[Kacls | None, str]:
        kacls = self._at(call.path)
        return kacls, "" if kacls is None or call.query else call.path.rpartition("/")[2]

    def _at(self, path: str) -> Kacls | None:
        """The KACLS whose base URL is *path* without its last segment."""
        directory = self._directory()
        if directory is not self._seen:
            self._seen, self._kacls = directory, {}
        base = path.rpartition("/")[0]
        known = self._kacls.get(base)
        if known is None and (found := directory.kacls_endpoint(base)) is not None:
            known = self._kacls[base] = Kacls.of(*found)
        return known

    # Serving.

    def _serve(self, kacls: Kacls, operation: str, call: Call) -> Served:
        """KeysNeededError, before anything was done."""
        exchange = Exchange(
            kacls=kacls,
            operation=operation,
            began_s=self._clock.boot_s(),
            body=call.body,
            origin=next(iter(call.values("origin")), None),
        )
        try:
            served = self._calls.operations[operation][1](exchange)
        except EXPECTED as error:
            return self._refused(exchange, error)
        return served if isinstance(served, Answer) else self._awaited(exchange, served)

    async def _awaited(self, exchange: Exchange, served: Awaitable[Answer]) -> Answer:
        try:
            return await served
        except EXPECTED as error:
            return self._refused(exchange, error)

    async def _serve_later(self, kacls: Kacls, operation: str, call: Call, needed: KeysNeededError) -> Answer:
        """Rule 4."""
        try:
            with self._limiter.hold(kacls.tenant, None):
                for _ in range(MAX_FETCHES):
                    await self._issuer_keys.refresh(needed.url, patient=needed.patient)
                    now = self._at(call.path)  # whom the tenant believes may have changed meanwhile
                    if now is None or any(origin not in now.origins for origin in call.values("origin")):
                        return self.refuse(Trouble.NOT_FOUND, call)
                    try:
                        served = self._serve(now, operation, call)
                    except KeysNeededError as again:
                        needed = again
                        continue
                    return served if isinstance(served, Answer) else await served
                raise KeysUnavailableError("the token issuers' keys are not at hand")  # noqa: TRY301
        except (QuotaExceeded, KeysUnavailableError) as error:
            origins = [origin for origin in call.values("origin") if origin in kacls.origins]
            return error_answer(*ANSWER_TO_ERROR[type(error)], code_of(error), origins=origins)

    def _refused(self, exchange: Exchange, error: SealgateError) -> Answer:
        status, message = status_and_message(error)
        code = code_of(error)
        if isinstance(error, DeniedError) and error.cause != code:
            exchange.detail["cause"] = error.cause
        if not exchange.recorded and exchange.operation not in PUBLIC:
            exchange.recorded = True
            stands_for = 1 if exchange.caller is not None else self._strangers.counted()
            try:
                if stands_for:
                    self._core.record(
                        exchange.entry(
                            self._clock.boot_s(),
                            Outcome.FAILED if status >= 500 else Outcome.REFUSED,
                            code,
                            items=stands_for,
                        )
                    )
            except NotRecorded as unrecorded:  # then nothing else may be answered
                error, code = unrecorded, unrecorded.code
                status, message = ANSWER_TO_ERROR[NotRecorded]
        details = error.cause if isinstance(error, DeniedError) else code
        if isinstance(error, MalformedError):
            message = f"{message[:-1]}: {error}."
        return error_answer(
            status, message, details, origins=exchange.origin, headers=retry_headers(error, status)
        )


def _is_json(call: Call) -> bool:
    """Whether a page would have had to ask first (CORS): forms and plain text need no preflight."""
    kinds = call.values("content-type")
    return len(kinds) == 1 and kinds[0].partition(";")[0].strip().lower() == "application/json"
