"""AWS KMS XKS proxy API v1 (specification 1.0.3; docs/encryption-service-xks.md).

1. A path is ours from its end: `[/<prefix>]/kms/xks/v1/keys/<id>/<operation>` or `.../health`, as received,
   without query, percent sign, empty or dot segment. The prefix is a tenant's key store; what names none is
   InvalidUriPathException, whoever signed it.
2. The order is the specification's: path, method, size, signature, quota, JSON and requestMetadata, secondary
   authorization, key, its state, its usage, fields, cipher. The first that fails answers.
3. Every cause of a failed authentication has one text; the record knows which it was.
4. A call of a store leaves an audit record before its answer leaves. Strangers cannot fill the log: a path
   that names no store leaves none, and of failed authentications at one store only so many are recorded.
5. CDIV is computed before the verifying decryption, over the very bytes that are sent.
6. Health asks how the tenant stands at every call; only the trial of the cipher is remembered, for less than
   the minute that the specification allows. So a revocation and an expiry show at once.
7. `kmsOperation` is never judged but by secondary authorization; an unknown one is served.
"""

import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, override

from envelope.errors import SealgateError
from envelope.keys import KeyId, KeyState, KeyUse
from proxy.encryption_service import sigv4
from proxy.encryption_service.access import Access, Caller
from proxy.encryption_service.call import Answer, Call
from proxy.encryption_service.core import Core, Entry, Outcome, Purpose, Ticket
from proxy.encryption_service.dialects import xks_messages as messages
from proxy.encryption_service.dialects.dialect import Dialect, Trouble
from proxy.encryption_service.dialects.xks_errors import (
    ANSWER_TO,
    MAX_BODY_BYTES,
    REFUSALS,
    CipherFailedError,
    ErrorName,
    code_of,
    error_answer,
    error_name,
)
from proxy.encryption_service.dialects.xks_store import API_PATH, MAX_URI_PATH_LENGTH, admitting_rule
from proxy.encryption_service.errors import (
    AccessDenied,
    DoesNotVerify,
    KeyNotFound,
    KeyRefused,
    NotAuthenticated,
    NotRecorded,
    QuotaExceeded,
    Refusal,
    Revoked,
    Stale,
    UsageRefused,
)
from proxy.encryption_service.key_states import Standing
from proxy.encryption_service.limits import Limiter
from proxy.encryption_service.model import DialectEntry, DialectName, NamedKey, Op, ServiceDirectory, XksStore
from proxy.encryption_service.settings import XksFleet
from proxy.encryption_service.strangers import Strangers
from runtime.clock import Clock
from runtime.tls import has_common_name

SERVICE: Final = "kms-xks-proxy"
MAX_PATH_LENGTH: Final = 256
"""The specification bounds the whole URI by this; the path alone can only be shorter."""
TRIAL_MAX_AGE_S: Final = 30.0
"""Half of what the specification allows a cached health result."""
VENDOR: Final = "Sealgate"
MODEL: Final = f"Sealgate {importlib.metadata.version('sealgate')}"
PING_PATH: Final = "/ping"

_PATH: Final = re.compile(
    r"((?:/[A-Za-z0-9_-]+)*)/kms/xks/v1/(?:keys/([A-Za-z0-9._-]{1,128})/(metadata|encrypt|decrypt)|(health))"
)
_PURPOSE: Final = Purpose(DialectName.XKS)
_has_common_name: Final = lru_cache(maxsize=256)(has_common_name)  # each call of a fleet shows the same one


_HEALTH_OF: Final[Mapping[Standing, str]] = {
    Standing.SERVING: "ACTIVE",
    Standing.DEGRADED: "DEGRADED",
    Standing.STALE: "UNAVAILABLE",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    prefix: str
    operation: str
    key_id: str
    """External; empty for health."""


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known of a call, for its audit record; filled in as it becomes known."""

    tenant: str
    route: Route
    began_s: float
    caller: Caller | None = None
    version: int = 0
    key_id: KeyId | None = None
    request_id: str = ""
    resource: str = ""
    detail: dict[str, str] = field(default_factory=dict)
    items: int = 1
    written: bool = False

    def entry(self, now_s: float, outcome: Outcome = Outcome.OK, error: str = "") -> Entry:
        caller = self.caller
        return Entry(
            dialect=DialectName.XKS,
            operation=self.route.operation,
            tenant=self.tenant,
            key=self.route.key_id,
            version=self.version,
            key_id=self.key_id,
            caller="" if caller is None else caller.name,
            credential_id="" if caller is None else caller.credential_id or "",
            request_id=self.request_id,
            resource=self.resource,
            outcome=outcome,
            error=error,
            items=self.items,
            latency_us=round((now_s - self.began_s) * 1e6),
            detail=self.detail,
        )

    def note(self, metadata: messages.Metadata | messages.HealthMetadata) -> None:
        """Keep of `requestMetadata` what the specification wants logged."""
        self.request_id = metadata.kms_request_id
        self.detail["kms_operation"] = metadata.kms_operation
        if isinstance(metadata, messages.HealthMetadata):
            return
        self.detail["principal"] = metadata.aws_principal_arn
        self.resource = metadata.kms_key_arn or ""
        for name, value in (
            ("via_service", metadata.kms_via_service),
            ("source_vpc", metadata.aws_source_vpc),
            ("source_vpce", metadata.aws_source_vpce),
        ):
            if value is not None:
                self.detail[name] = value


class XksDialect(Dialect):
    """One object per process, for the key stores of all tenants."""

    name = DialectName.XKS
    max_body_bytes = MAX_BODY_BYTES

    def __init__(
        self,
        *,
        core: Core,
        access: Access,
        limiter: Limiter,
        directory: Callable[[], ServiceDirectory],
        clock: Clock,
        fleet: XksFleet | None = None,
    ) -> None:
        self._core: Final = core
        self._access: Final = access
        self._limiter: Final = limiter
        self._directory: Final = directory
        self._clock: Final = clock
        self._fleet: Final = XksFleet() if fleet is None else fleet
        self._strangers: Final[dict[str, Strangers]] = {}  # by prefix: stores of the directory alone
        self._tried_at_s = -math.inf
        self._encrypts: Final = messages.Reader(messages.EncryptRequest)
        self._decrypts: Final = messages.Reader(messages.DecryptRequest)
        self._asks_metadata: Final = messages.Reader(messages.MetadataRequest)
        self._asks_health: Final = messages.Reader(messages.HealthRequest)
        self._operations: Final[Mapping[str, Callable[[XksStore, Caller, Record, bytes], Answer]]] = {
            "metadata": self._metadata,
            "encrypt": self._encrypt,
            "decrypt": self._decrypt,
            "health": self._health,
        }

    # The HTTP layer's side.

    @override
    def claims(self, path: str) -> bool:
        return f"{path}/".find(f"{API_PATH}/") >= 0 or path == PING_PATH

    @override
    def handle(self, call: Call) -> Answer:
        if call.path == PING_PATH:
            return _ping(call)
        found = self._found(call)
        if isinstance(found, Trouble):
            return self.refuse(found, call)
        if len(call.body) > MAX_BODY_BYTES:
            return self.refuse(Trouble.TOO_LARGE, call)
        route, dialect_entry, store = found
        record = Record(tenant=dialect_entry.tenant, route=route, began_s=self._clock.boot_s())
        try:
            caller = self._authenticate(store, record, call)
            record.caller = caller
            self._limiter.admit(caller.tenant, caller.credential_id)
            return self._operations[route.operation](store, caller, record, call.body)
        except REFUSALS as error:
            return self._refused(record, error)

    @override
    def refuse(self, trouble: Trouble, call: Call | None, detail: str = "") -> Answer:
        if trouble is Trouble.TOO_LARGE and call is not None:
            found = self._found(call)
            if isinstance(found, Trouble):  # which comes first (rule 2)
                trouble, detail = found, ""
        status, name, message = ANSWER_TO[trouble]
        headers = (("allow", "POST"),) if trouble is Trouble.METHOD else ()
        return error_answer(name, detail or message, status=status, headers=headers)

    # Steps of every call.

    def _found(self, call: Call) -> tuple[Route, DialectEntry, XksStore] | Trouble:
        """What *call* is about and whose store it names; else what is the matter with path or method."""
        route = route_of(call)
        found = None if route is None else self._directory().xks_store(route.prefix)
        if route is None or found is None:
            return Trouble.NOT_FOUND
        return (route, *found) if call.method == "POST" else Trouble.METHOD

    def _authenticate(self, store: XksStore, record: Record, call: Call) -> Caller:
        """NotAuthenticated, whose cause is in the record alone."""
        if store.client_subject is not None and not _has_common_name(
            call.peer.certificate_der, store.client_subject
        ):
            record.detail["cause"] = "client-certificate"
            raise NotAuthenticated
        try:
            claim = sigv4.read_claim(
                call.headers, now_s=self._clock.wall_s(), service=SERVICE, region=store.region
            )
        except sigv4.NotSignedError as error:
            record.detail["cause"] = error.cause
            raise NotAuthenticated from None
        record.detail["region"] = claim.region
        candidate = self._access.sigv4(
            claim.access_key_id, dialect=DialectName.XKS, endpoint=store.prefix, peer=call.peer
        )
        matches = True
        try:
            sigv4.verify(
                claim,
                candidate.secret,
                method=call.method,
                path=call.path,
                headers=call.headers,
                body=call.body,
            )
        except sigv4.NotSignedError:
            matches = False
        try:
            caller = candidate.admit(matches=matches)
        except NotAuthenticated:
            record.detail["cause"] = "credential" if candidate.caller is None else "signature"
            record.detail["claimed"] = claim.access_key_id
            raise
        if caller.tenant != record.tenant:  # the prefix was another tenant's when the credential was issued
            record.detail["cause"] = "tenant"
            raise NotAuthenticated
        return caller

    def _second_opinion(self, store: XksStore, record: Record, metadata: messages.Metadata) -> None:
        """Secondary authorization; AccessDenied."""
        if not store.rules:
            return
        rule = admitting_rule(store.rules, metadata)
        if rule is None:
            record.detail["rule"] = "none admits"
            raise AccessDenied("no rule of the key store admits this call")
        record.detail["rule"] = rule.name

    def _find(self, store: XksStore, record: Record) -> NamedKey:
        """KeyNotFound also for a key that is no AES key: the API has no others."""
        name = store.keys.get(record.route.key_id)
        if name is None:
            raise KeyNotFound("there is no such external key in this key store")
        key = self._core.states.find(record.tenant, name)
        if key.use is not KeyUse.DATA:
            raise KeyNotFound("the external key is not an AES-256 key")
        return key

    def _refused(self, record: Record, error: SealgateError) -> Answer:
        name = error_name(error)
        if not record.written:
            record.written = True
            try:
                self._record_refusal(record, error, name)
            except NotRecorded:
                return error_answer(ErrorName.INTERNAL, "the audit log cannot be written")
        headers: tuple[tuple[str, str], ...] = ()
        if isinstance(error, QuotaExceeded):
            headers = (("retry-after", str(math.ceil(error.retry_after_s))),)
        return error_answer(name, str(error), headers=headers)

    def _record_refusal(self, record: Record, error: SealgateError, name: ErrorName) -> None:
        """NotRecorded. What a record of strangers stands for is in its `items`."""
        if record.caller is None:
            prefix = record.route.prefix
            strangers = self._strangers.get(prefix)
            if strangers is None:
                strangers = self._strangers[prefix] = Strangers(self._clock)
            record.items = strangers.counted()
            if not record.items:
                return
        outcome = Outcome.FAILED if isinstance(error, CipherFailedError) else Outcome.REFUSED
        record.detail["error_name"] = name
        self._core.record(record.entry(self._clock.boot_s(), outcome, code_of(error)))

    # The four operations.

    def _encrypt(self, store: XksStore, caller: Caller, record: Record, body: bytes) -> Answer:
        request = self._encrypts.read(body)
        record.note(request.request_metadata)
        self._second_opinion(store, record, request.request_metadata)
        key = self._find(store, record)
        ticket = self._admit(caller, key, Op.ENCRYPT)
        trying = None
        if request.ciphertext_data_integrity_value_algorithm is not None:
            trying = self._admit(caller, key, Op.DECRYPT)
        given = messages.encrypt_input(request)
        sealed = self._core.encrypt(
            ticket,
            given.plaintext,
            lambda version, nonce: messages.bound(given.aad, messages.metadata_of(version, nonce)),
            purpose=_PURPOSE,
        )
        record.version, record.key_id = sealed.version, sealed.key_id
        response = messages.response_of(sealed, given)
        if trying is not None:
            self._try_back(trying, given, response, sealed.version)  # CDIV is there already: rule 5
        self._finish(ticket, record)
        return Answer(status=200, body=messages.written(response))

    def _decrypt(self, store: XksStore, caller: Caller, record: Record, body: bytes) -> Answer:
        request = self._decrypts.read(body)
        record.note(request.request_metadata)
        self._second_opinion(store, record, request.request_metadata)
        ticket = self._admit(caller, self._find(store, record), Op.DECRYPT)
        given = messages.decrypt_input(request)
        record.version = given.version
        plaintext = self._core.decrypt(
            ticket,
            version=given.version,
            nonce=given.nonce,
            ciphertext=given.ciphertext,
            tag=given.tag,
            aad=given.aad,
            purpose=_PURPOSE,
        )
        self._finish(ticket, record)
        return Answer(status=200, body=messages.written(messages.DecryptResponse(plaintext)))

    def _metadata(self, store: XksStore, caller: Caller, record: Record, body: bytes) -> Answer:
        request = self._asks_metadata.read(body)
        record.note(request.request_metadata)
        self._second_opinion(store, record, request.request_metadata)
        key = self._find(store, record)
        usage = self._usage(caller, key)
        status = "ENABLED"
        match self._state_of(key):
            case KeyState.ACTIVE:
                pass
            case KeyState.DEACTIVATED:
                usage = tuple(op for op in usage if op is Op.DECRYPT)
            case _:
                status = "DISABLED"
        response = messages.MetadataResponse(tuple(op.value.upper() for op in usage), status)
        self._core.record(record.entry(self._clock.boot_s()))
        return Answer(status=200, body=messages.written(response))

    def _health(self, store: XksStore, caller: Caller, record: Record, body: bytes) -> Answer:
        del store, caller
        request = self._asks_health.read(body)
        record.note(request.request_metadata)
        standing = self._core.states.standing(record.tenant)
        if standing is Standing.REVOKED:
            raise Revoked("the keys of this key store were withdrawn by their owner")
        self._try_cipher()
        record.detail["health"] = _HEALTH_OF[standing]
        manager = messages.Manager(record.tenant, self._fleet.manager_model, _HEALTH_OF[standing])
        response = messages.HealthResponse(
            self._fleet.proxies, VENDOR, MODEL, VENDOR, ekm_fleet_details=(manager,)
        )
        self._core.record(record.entry(self._clock.boot_s()))
        return Answer(status=200, body=messages.written(response))

    # Their parts.

    def _admit(self, caller: Caller, key: NamedKey, op: Op) -> Ticket:
        """As `Core.admit`, but a key's state is told before what the key is not for (rule 2)."""
        try:
            return self._core.admit(caller, key, op)
        except UsageRefused:
            if self._state_of(key) in {KeyState.ACTIVE, KeyState.DEACTIVATED}:
                raise
            raise KeyRefused(Refusal.BLOCKED, f"key {key.name} is not enabled") from None

    def _state_of(self, key: NamedKey) -> KeyState:
        """Of the key as AWS is to see it: blocked and withdrawn keys are suspended. Stale."""
        standing = self._core.states.standing(key.tenant, key)
        if key.blocked or standing is Standing.REVOKED:
            return KeyState.SUSPENDED
        state = self._core.states.state_of(key)
        if standing is Standing.STALE or state is None:
            raise Stale("no valid key is here at the moment")
        return state

    def _usage(self, caller: Caller, key: NamedKey) -> tuple[Op, ...]:
        """Which of the two operations *key* has for *caller*. AccessDenied if the credential has neither."""
        usage: list[Op] = []
        allowed, denied = False, None
        for op in (Op.ENCRYPT, Op.DECRYPT):
            try:
                self._access.authorize(caller, key, op)
            except AccessDenied as error:
                denied = denied or error
                continue
            if op in key.operations:
                usage.append(op)
            allowed = True
        if not allowed and denied is not None:
            raise denied
        return tuple(usage)

    def _try_back(
        self, ticket: Ticket, given: messages.EncryptInput, response: messages.EncryptResponse, version: int
    ) -> None:
        """CipherFailedError unless *response*, as it will be sent, decrypts to what was given."""
        metadata, iv = response.ciphertext_metadata, response.initialization_vector
        try:
            plaintext = self._core.decrypt(
                ticket,
                version=version,
                nonce=messages.nonce_of(metadata, iv),
                ciphertext=response.ciphertext,
                tag=response.authentication_tag,
                aad=messages.bound(given.aad, metadata),
                purpose=_PURPOSE,
            )
        except DoesNotVerify:
            raise CipherFailedError("what was encrypted does not decrypt") from None
        if plaintext != given.plaintext:
            raise CipherFailedError("what was encrypted does not decrypt to what was given")

    def _try_cipher(self) -> None:
        """Encrypt and decrypt with a test key, at most TRIAL_MAX_AGE_S ago (rule 6). CipherFailedError."""
        now_s = self._clock.boot_s()
        if not 0 <= now_s - self._tried_at_s < TRIAL_MAX_AGE_S:
            if not self._core.self_test():
                self._tried_at_s = -math.inf
                raise CipherFailedError("the trial of the cipher failed")
            self._tried_at_s = now_s

    def _finish(self, ticket: Ticket, record: Record) -> None:
        """Everything asked again, and recorded. ServiceError, which then is recorded already."""
        record.written = True
        self._core.finish(ticket, record.entry(self._clock.boot_s()))


def route_of(call: Call) -> Route | None:
    """What *call* is about, whatever its method; None if its path is none of the API's (rule 1)."""
    if call.query or len(call.path) > MAX_PATH_LENGTH:
        return None
    match = _PATH.fullmatch(call.path)
    if match is None:
        return None
    prefix, key_id, operation, health = match.groups()
    if key_id in (".", "..") or len(prefix) + len(API_PATH) > MAX_URI_PATH_LENGTH:
        return None
    return Route(prefix=prefix.removeprefix("/"), operation=health or operation, key_id=key_id or "")


def _ping(call: Call) -> Answer:
    """For load balancers: this process answers, no more."""
    if call.method not in ("GET", "HEAD"):
        return error_answer(
            ErrorName.VALIDATION, "the method must be GET", status=405, headers=(("allow", "GET, HEAD"),)
        )
    return Answer(status=200, body=b'{"status":"ok"}')
