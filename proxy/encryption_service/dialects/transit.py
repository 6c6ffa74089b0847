"""Vault's and OpenBao's transit API over the named keys of a tenant (docs/encryption-service-transit.md).

1. The token names the tenant; mount and namespace must agree with it. Nothing is told to whom no token is
   known, but `sys/health` and `sys/seal-status`.
2. Texts and shapes are the original's (OpenBao 2.7), found by asking it; tests compare both. Where it answers
   500 to a mistake of the client's, we answer 400: clients retry 5xx.
3. Keys are made, rotated and deleted by the enterprise's key agent alone: these calls are 403.
4. A tenant who has withdrawn its keys is a sealed vault: 503, in health too.
5. One table maps the core's errors. Within a batch, what concerns one item is that item's error; what
   concerns the key or the tenant ends the call.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, override
from urllib.parse import parse_qsl, unquote

import msgspec

from proxy.encryption_service.access import Access, Caller
from proxy.encryption_service.call import Answer, Call, DuplicateHeaderError
from proxy.encryption_service.core import Core, Purpose, Standing, Ticket
from proxy.encryption_service.dialects import transit_keys
from proxy.encryption_service.dialects.bearer import BearerCalls, Work
from proxy.encryption_service.dialects.dialect import Dialect, Trouble
from proxy.encryption_service.dialects.transit_bodies import (
    MAX_VERSION,
    BodyError,
    CiphertextItem,
    DataKeyBody,
    DecryptBody,
    EncryptBody,
    EncryptItem,
    NoBody,
    Reader,
    RewrapBody,
    SignBody,
    SignItem,
    VerifyBody,
    VerifyItem,
    decode_base64,
    encode_base64,
    format_ciphertext,
    format_signature,
    parse_ciphertext,
    parse_signature,
)
from proxy.encryption_service.dialects.transit_errors import (
    AGENT_ALONE,
    DENIED,
    HEADERS,
    ITEM_ERRORS,
    MAX_ERROR_CHARS,
    UNSUPPORTED_OPERATION,
    UNSUPPORTED_PATH,
    VaultError,
    answer_for,
    errors,
    item_text,
)
from proxy.encryption_service.dialects.transit_signing import chosen_scheme, wants_jws
from proxy.encryption_service.errors import (
    AccessDenied,
    DoesNotVerify,
    KeyNotFound,
    KeyRefused,
    NotAuthenticated,
    Revoked,
    ServiceError,
    Stale,
)
from proxy.encryption_service.limits import Limiter
from proxy.encryption_service.model import (
    DialectName,
    NamedKey,
    Op,
    ServiceDirectory,
    TransitMount,
    TransitSettings,
)
from runtime.clock import Clock

MAX_BODY_BYTES: Final = 32 << 20
MAX_ITEMS: Final = 1000
VERSION: Final = "0.1.0+sealgate"
"""In health answers; a semantic version, as clients parse it."""

_TOKEN: Final = "x-vault-token"  # noqa: S105 - a header's name
_WANTED: Final = frozenset({_TOKEN, "authorization", "x-vault-namespace", "x-vault-wrap-ttl"})
_HEALTH: Final = frozenset({"health", "seal-status", "leader", "init"})
_READING: Final = frozenset({"GET", "LIST"})
_WRITING: Final = frozenset({"POST", "PUT"})
_KNOWN_METHODS: Final = frozenset({"GET", "LIST", "POST", "PUT", "DELETE", "PATCH", "HEAD"})
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_DATA_KEY_BITS: Final = frozenset({128, 256, 512})
_NO_CONTEXT: Final = Purpose(DialectName.TRANSIT)
_FORMAT: Final = b"\x01"
"""The first byte of a ciphertext, bound by standing before the associated data."""

_SUCCESS: Final = (
    b'{"request_id":"%b","lease_id":"","renewable":false,"lease_duration":0,"data":%b,'
    b'"wrap_info":null,"warnings":%b,"auth":null}\n'
)


class _Place(NamedTuple):
    """Where in the API a path points: below a mount of the tenant's."""

    mount: TransitMount
    operation: str
    rest: str


@dataclass(slots=True)
class _Request:
    """One call while it is served."""

    call: Call
    work: Work
    caller: Caller
    name: str
    warnings: list[str] = field(default_factory=list)


class TransitDialect(Dialect):
    """`/v1/...` for all tenants that have transit switched on."""

    name = DialectName.TRANSIT

    def __init__(
        self,
        *,
        core: Core,
        access: Access,
        limiter: Limiter,
        directory: Callable[[], ServiceDirectory],
        clock: Clock,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_items: int = MAX_ITEMS,
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self._core = core
        self._directory = directory
        self._clock = clock
        self._calls = BearerCalls(
            self.name, core=core, access=access, limiter=limiter, directory=directory, clock=clock
        )
        self._encrypt_body = Reader(EncryptBody, max_items=max_items)
        self._decrypt_body = Reader(DecryptBody, max_items=max_items)
        self._rewrap_body = Reader(RewrapBody, max_items=max_items)
        self._data_key_body = Reader(DataKeyBody, max_items=max_items)
        self._sign_body = Reader(SignBody, max_items=max_items)
        self._verify_body = Reader(VerifyBody, max_items=max_items)
        self._no_body = Reader(NoBody, max_items=max_items)
        self._writes: Mapping[str, Callable[[_Request], Answer]] = {
            "encrypt": self._encrypt,
            "decrypt": self._decrypt,
            "rewrap": self._rewrap,
            "datakey": self._data_key,
            "sign": self._sign,
            "verify": self._verify,
        }

    @override
    def claims(self, path: str) -> bool:
        return path.startswith("/v1/")

    @override
    def handle(self, call: Call) -> Answer:
        work = self._calls.begin()
        request_id = _request_id()
        work.client_request_id = request_id
        try:
            try:
                return self._serve(call, work)
            except VaultError as error:
                self._calls.record_refusal(work, f"http-{error.status}")
                return errors(error.status, *error.errors)
            except BodyError as error:
                self._calls.record_refusal(work, "malformed")
                return errors(error.status, error.text)
            except DuplicateHeaderError as error:
                self._calls.record_refusal(work, "malformed")
                return errors(400, str(error))
            except ServiceError as error:
                self._calls.record_refusal(work, error)
                return self._refused(error, work)
        except ServiceError as error:  # NotRecorded: nothing else may be answered
            return self._refused(error, work)

    @override
    def refuse(self, trouble: Trouble, call: Call | None, detail: str = "") -> Answer:
        match trouble:
            case Trouble.NOT_FOUND:
                return errors(404)
            case Trouble.METHOD:
                return errors(405, UNSUPPORTED_OPERATION)
            case Trouble.TOO_LARGE:
                return errors(413, "http: request body too large")
            case Trouble.MALFORMED_HTTP:
                return errors(400, detail or "malformed request")
            case Trouble.TIMEOUT:
                return errors(408, "the request came too slowly")
            case Trouble.OVERLOAD:
                return errors(429, "too many requests at once: retry later", retry_after_s=1)
            case Trouble.STOPPING:
                return errors(503, "this server is stopping: retry", retry_after_s=1)
            case _:
                return errors(500, "internal error")

    # Finding what is asked.

    def _serve(self, call: Call, work: Work) -> Answer:
        path = call.path[4:]
        if call.method not in _KNOWN_METHODS:
            raise VaultError(405)
        if path.startswith("sys/") and path[4:] in _HEALTH:
            return self._health(call, work, path[4:])
        headers = _headers(call)
        caller = self._calls.authenticate(work, _token(headers), call)
        if headers.get("x-vault-wrap-ttl", "0") not in {"0", "0s", ""}:
            raise VaultError(400, "response wrapping is not supported")
        if path.startswith("auth/token/"):
            return self._token_call(_Request(call, work, caller, ""), path[11:])
        place = self._place(caller, headers.get("x-vault-namespace", ""), path)
        work.resource = place.mount.mount
        request = _Request(call, work, caller, place.rest)
        if place.operation == "keys":
            return self._keys(request)
        serve = self._writes.get(place.operation)
        if serve is None:
            raise VaultError(404, UNSUPPORTED_PATH)
        work.operation = place.operation
        if not place.rest:
            raise VaultError(400, "cannot write to a path ending in '/'")
        if call.method not in _WRITING:
            raise VaultError(405, UNSUPPORTED_OPERATION)
        return serve(request)

    def _place(self, caller: Caller, namespace: str, path: str) -> _Place:
        """VaultError: no such mount of this tenant's, or one the credential is not for."""
        entry = self._directory().dialect(caller.tenant, self.name)
        if "%" in path:
            path = unquote(path, errors="surrogateescape")
        namespace = namespace.strip("/")
        settings = entry.settings if entry is not None else None
        if isinstance(settings, TransitSettings):
            for mount in settings.mounts:
                own = mount.namespace or caller.tenant
                rest = _below(path, mount.mount)
                if rest is None and not namespace and mount.namespace is not None:
                    rest = _below(path, f"{mount.namespace}/{mount.mount}")
                if rest is None:
                    continue
                if namespace and namespace != own:
                    raise VaultError(404, "namespace not found")
                if caller.endpoint is not None and caller.endpoint != mount.mount:
                    raise AccessDenied("the credential is not for this mount")
                operation, slash, name = rest.partition("/")
                if not slash and operation != "keys":
                    raise VaultError(404, UNSUPPORTED_PATH)
                return _Place(mount, operation, name)
        raise VaultError(404, f'no handler for route "{path}". route entry not found.')

    def _admit(self, request: _Request, op: Op) -> Ticket:
        name = request.name
        if not _NAME.fullmatch(name):
            if name.endswith("/"):
                raise VaultError(400, "cannot write to a path ending in '/'")
            raise VaultError(404, UNSUPPORTED_PATH)
        return self._calls.admit(request.work, request.caller, name, op)

    # Cipher.

    def _encrypt(self, request: _Request) -> Answer:
        body, ignored = self._encrypt_body.read(request.call.body)
        if body.batch_input is not None:
            return self._encrypt_batch(request, body, body.batch_input, ignored)
        if body.plaintext is None:
            request.work.key = request.name
            raise BodyError("missing plaintext to encrypt")
        ticket = self._admit(request, Op.ENCRYPT)
        version, text = self._encrypted(ticket, request.work, body.plaintext, body)
        self._calls.finish(request.work, ticket)
        if ignored:
            return _success(request, {"ciphertext": text, "key_version": version}, ignored)
        data = b'{"ciphertext":"%b","key_version":%d}' % (text.encode(), version)
        return _answer(200, _SUCCESS % (request.work.client_request_id.encode(), data, b"null"))

    def _encrypted(
        self, ticket: Ticket, work: Work, plaintext: str, how: EncryptItem | EncryptBody
    ) -> tuple[int, str]:
        sealed = self._core.encrypt(
            ticket,
            decode_base64(plaintext),
            _associated(how.associated_data),
            purpose=_purpose(how.context),
            version=_wanted_version(how.key_version, "encryption"),
        )
        work.used(sealed.version, sealed.key_id)
        return sealed.version, format_ciphertext(sealed.version, sealed.nonce, sealed.ciphertext, sealed.tag)

    def _encrypt_batch(
        self, request: _Request, body: EncryptBody, items: list[EncryptItem], ignored: list[str]
    ) -> Answer:
        _check_contexts(items)
        self._calls.admit_batch(request.work, len(items))
        ticket = self._admit(request, Op.ENCRYPT)
        results: list[dict[str, Any]] = []
        failures = 0
        for item in items:
            try:
                version, text = self._encrypted(ticket, request.work, item.plaintext, item)
                results.append({"ciphertext": text, "key_version": version, "reference": item.reference})
            except ITEM_ERRORS as error:
                failures += 1
                results.append({"error": item_text(error, request.work.op), "reference": item.reference})
        self._calls.finish(request.work, ticket)
        status = _batch_status(request, body.partial_failure_response_code, failures, len(items))
        return _success(request, {"batch_results": results}, ignored, status=status)

    def _decrypt(self, request: _Request) -> Answer:
        body, ignored = self._decrypt_body.read(request.call.body)
        if body.batch_input is not None:
            return self._decrypt_batch(request, body, body.batch_input, ignored)
        if not body.ciphertext:
            request.work.key = request.name
            raise BodyError("missing ciphertext to decrypt")
        ticket = self._admit(request, Op.DECRYPT)
        plaintext = self._decrypted(
            ticket, request.work, body.ciphertext, body.associated_data, _purpose(body.context)
        )
        self._calls.finish(request.work, ticket)
        return _success(request, {"plaintext": encode_base64(plaintext)}, ignored)

    def _decrypted(self, ticket: Ticket, work: Work, ciphertext: str, data: str, purpose: Purpose) -> bytes:
        parsed = parse_ciphertext(ciphertext)
        plaintext = self._core.decrypt(
            ticket,
            version=parsed.version,
            nonce=parsed.nonce,
            ciphertext=parsed.ciphertext,
            tag=parsed.tag,
            aad=_associated(data),
            purpose=purpose,
        )
        work.used(parsed.version)
        return plaintext

    def _decrypt_batch(
        self, request: _Request, body: DecryptBody, items: list[CiphertextItem], ignored: list[str]
    ) -> Answer:
        _check_contexts(items)
        self._calls.admit_batch(request.work, len(items))
        ticket = self._admit(request, Op.DECRYPT)
        results: list[dict[str, Any]] = []
        failures = 0
        for item in items:
            try:
                plaintext = self._decrypted(
                    ticket, request.work, item.ciphertext, item.associated_data, _purpose(item.context)
                )
                results.append({"plaintext": encode_base64(plaintext), "reference": item.reference})
            except ITEM_ERRORS as error:
                failures += 1
                text = item_text(error, request.work.op)
                results.append({"plaintext": "", "error": text, "reference": item.reference})
        self._calls.finish(request.work, ticket)
        status = _batch_status(request, body.partial_failure_response_code, failures, len(items))
        return _success(request, {"batch_results": results}, ignored, status=status)

    def _rewrap(self, request: _Request) -> Answer:
        body, ignored = self._rewrap_body.read(request.call.body)
        items = body.batch_input
        if items is None:
            single = CiphertextItem(
                ciphertext=body.ciphertext,
                context=body.context,
                associated_data=body.associated_data,
                key_version=body.key_version,
            )
            if not single.ciphertext:
                request.work.key = request.name
                raise BodyError("missing ciphertext to decrypt")
            ticket = self._admit(request, Op.REWRAP)
            version, text = self._rewrapped(ticket, request.work, single)
            self._calls.finish(request.work, ticket)
            return _success(request, {"ciphertext": text, "key_version": version}, ignored)
        _check_contexts(items)
        self._calls.admit_batch(request.work, len(items))
        ticket = self._admit(request, Op.REWRAP)
        results: list[dict[str, Any]] = []
        for item in items:
            try:
                version, text = self._rewrapped(ticket, request.work, item)
                results.append({"ciphertext": text, "key_version": version, "reference": item.reference})
            except ITEM_ERRORS as error:
                results.append({"error": item_text(error, request.work.op), "reference": item.reference})
        self._calls.finish(request.work, ticket)
        return _success(request, {"batch_results": results}, ignored)

    def _rewrapped(self, ticket: Ticket, work: Work, item: CiphertextItem) -> tuple[int, str]:
        purpose = _purpose(item.context)
        plaintext = self._decrypted(ticket, work, item.ciphertext, item.associated_data, purpose)
        wanted = _wanted_version(item.key_version, "encryption")
        aad = _associated(item.associated_data)
        try:
            sealed = self._core.encrypt(ticket, plaintext, aad, purpose=purpose, version=wanted)
        except KeyRefused as error:  # in the words of the half that failed
            raise BodyError(item_text(error, Op.ENCRYPT)) from None
        work.used(sealed.version, sealed.key_id)
        return sealed.version, format_ciphertext(sealed.version, sealed.nonce, sealed.ciphertext, sealed.tag)

    def _data_key(self, request: _Request) -> Answer:
        kind, _slash, request.name = request.name.partition("/")
        if not request.name:
            raise VaultError(404, UNSUPPORTED_PATH)
        if kind not in {"plaintext", "wrapped"}:
            raise BodyError("Invalid path, must be 'plaintext' or 'wrapped'")
        body, ignored = self._data_key_body.read(request.call.body)
        purpose = _purpose(body.context, "failed to base64-decode context")
        aad = _associated(body.associated_data)
        version = _wanted_version(body.key_version, "encryption")
        ticket = self._admit(request, Op.GENERATE)
        if body.bits not in _DATA_KEY_BITS:
            raise BodyError("invalid bit length")
        data_key = os.urandom(body.bits // 8)
        sealed = self._core.encrypt(ticket, data_key, aad, purpose=purpose, version=version)
        request.work.used(sealed.version, sealed.key_id)
        self._calls.finish(request.work, ticket)
        text = format_ciphertext(sealed.version, sealed.nonce, sealed.ciphertext, sealed.tag)
        data: dict[str, Any] = {"ciphertext": text, "key_version": sealed.version}
        if kind == "plaintext":
            data["plaintext"] = encode_base64(data_key)
        return _success(request, data, ignored)

    # Signatures.

    def _sign(self, request: _Request) -> Answer:
        request.name, slash, hash_name = request.name.partition("/")
        body, ignored = self._sign_body.read(request.call.body)
        if body.batch_input is not None:
            self._calls.admit_batch(request.work, len(body.batch_input))
        ticket = self._admit(request, Op.SIGN)
        scheme = chosen_scheme(ticket.key, body, hash_name if slash else "", verifies=False)
        jws = wants_jws(body)
        version = _wanted_version(body.key_version, "signing")

        def signed(text: str) -> tuple[int, str]:
            made = self._core.sign(ticket, _input(text), scheme, version=version)
            request.work.used(made.version, made.key_id)
            return made.version, format_signature(made.version, made.signature, jws=jws)

        if body.batch_input is None:
            number, signature = signed(body.input)
            self._calls.finish(request.work, ticket)
            return _success(request, {"key_version": number, "signature": signature}, ignored)
        results = [self._sign_item(request, item, signed) for item in body.batch_input]
        self._calls.finish(request.work, ticket)
        return _success(request, {"batch_results": results}, ignored)

    def _sign_item(
        self, request: _Request, item: SignItem, sign: Callable[[str], tuple[int, str]]
    ) -> dict[str, Any]:
        try:
            if item.input is None:
                raise BodyError("missing input")
            version, signature = sign(item.input)
        except ITEM_ERRORS as error:
            return {"key_version": 0, "error": item_text(error, request.work.op), "reference": item.reference}
        return {"signature": signature, "key_version": version, "reference": item.reference}

    def _verify(self, request: _Request) -> Answer:
        request.name, slash, hash_name = request.name.partition("/")
        body, ignored = self._verify_body.read(request.call.body)
        items = body.batch_input
        if items is None and not body.signature and not body.hmac:
            request.work.key = request.name
            raise BodyError("neither a 'signature' nor an 'hmac' were given to verify")
        if items is not None:
            _check_signatures(items)
            self._calls.admit_batch(request.work, len(items))
        elif body.hmac:
            raise BodyError("verifying an HMAC is not supported")
        ticket = self._admit(request, Op.VERIFY)
        scheme = chosen_scheme(ticket.key, body, hash_name if slash else "", verifies=True)
        jws = wants_jws(body)

        def verified(text: str, signature: str) -> bool:
            message = _input(text)
            version, raw = parse_signature(signature, jws=jws)
            try:
                self._core.verify(ticket, version, raw, message, scheme)
            except DoesNotVerify:
                return False
            finally:
                request.work.used(version)
            return True

        if items is None:
            valid = verified(body.input, body.signature)
            self._calls.finish(request.work, ticket)
            return _success(request, {"valid": valid}, ignored)
        results = [self._verify_item(request, item, verified) for item in items]
        self._calls.finish(request.work, ticket)
        return _success(request, {"batch_results": results}, ignored)

    def _verify_item(
        self, request: _Request, item: VerifyItem, verify: Callable[[str, str], bool]
    ) -> dict[str, Any]:
        try:
            if item.input is None:
                raise BodyError("missing input")
            valid = verify(item.input, item.signature or "")
        except ITEM_ERRORS as error:
            return {"valid": False, "error": item_text(error, request.work.op), "reference": item.reference}
        return {"valid": valid, "reference": item.reference}

    # Keys.

    def _keys(self, request: _Request) -> Answer:
        method, name, work = request.call.method, request.name, request.work
        query = dict(parse_qsl(request.call.query, keep_blank_values=True))
        if "list" in query and query["list"].lower() not in {"true", "1", "t", "false", "0", "f"}:
            raise VaultError(400)
        is_list = method == "LIST" or query.get("list", "").lower() in {"true", "1", "t"}
        if not name:
            if not is_list or method not in _READING:
                raise VaultError(405, UNSUPPORTED_OPERATION)
            work.operation = "list-keys"
            return self._list_keys(request, query)
        name, slash, action = name.partition("/")
        if is_list or (slash and not action):
            raise VaultError(404, UNSUPPORTED_PATH)
        if method in _READING and not slash:
            work.operation = "read-key"
            return self._read_key(request, name)
        if method in _WRITING or (method == "DELETE" and not slash):
            work.operation = f"{action or ('delete' if method == 'DELETE' else 'create')}-key"
            work.key = name
            raise VaultError(403, DENIED, AGENT_ALONE)
        raise VaultError(405, UNSUPPORTED_OPERATION)

    def _list_keys(self, request: _Request, query: Mapping[str, str]) -> Answer:
        names = [key.name for key in self._calls.visible(request.caller)]
        after = query.get("after", "")
        names = [name for name in names if name > after]
        limit = query.get("limit", "")
        if limit.isascii() and limit.isdecimal() and int(limit[:9]) > 0:
            names = names[: int(limit[:9])]
        if not names:
            raise VaultError(404)
        self._calls.record(request.work)
        return _success(request, {"keys": names})

    def _read_key(self, request: _Request, name: str) -> Answer:
        try:
            key = self._calls.describable(request.work, request.caller, name)
        except KeyNotFound:
            raise VaultError(404) from None
        described = transit_keys.describe(key, self._core.versions(key))
        standing = self._core.standing(key.tenant, key)
        if standing is Standing.REVOKED:
            raise Revoked("the keys were withdrawn by their owner")
        if standing is Standing.STALE:
            raise Stale("no valid key is here at the moment")
        self._calls.record(request.work)
        return _success(request, described)

    # Token and health.

    def _token_call(self, request: _Request, what: str) -> Answer:
        caller, method = request.caller, request.call.method
        request.work.operation = f"token-{what}"[:64]
        if what == "lookup-self" and method in {"GET", *_WRITING}:
            self._calls.record(request.work)
            return _success(request, self._token_facts(caller))
        if what == "renew-self" and method in _WRITING:
            self._no_body_or_increment(request)
            raise VaultError(400, "lease is not renewable")
        if what in {"lookup-self", "renew-self"}:
            raise VaultError(405, UNSUPPORTED_OPERATION)
        raise VaultError(403, DENIED)

    def _no_body_or_increment(self, request: _Request) -> None:
        """BodyError if it is no JSON."""
        self._no_body.read(request.call.body)

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
            "expire_time": None if entry.not_after_s is None else transit_keys.rfc3339(entry.not_after_s),
            "explicit_max_ttl": 0,
            "id": entry.id,
            "issue_time": transit_keys.rfc3339(entry.created_at_s),
            "meta": {"tenant": entry.tenant},
            "num_uses": 0,
            "orphan": True,
            "path": "auth/token/create",
            "policies": ["sealgate"],
            "renewable": False,
            "ttl": left_s,
            "type": "service",
        }

    def _health(self, call: Call, work: Work, what: str) -> Answer:
        """Without a token too: then of the one tenant there is, or of the process."""
        work.operation = what
        if call.method not in {"GET", "HEAD"}:
            raise VaultError(405)
        standing = self._standing_for(call, work)
        sealed = standing in {Standing.REVOKED, Standing.STALE}
        if what == "init":
            return _json(200, {"initialized": True})
        if what == "leader":
            return _json(200, {"ha_enabled": False, "is_self": False, "leader_address": ""})
        if what == "seal-status":
            return _json(200, _seal_status(sealed=sealed))
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
        return _json(status, document, empty=call.method == "HEAD")

    def _standing_for(self, call: Call, work: Work) -> Standing:
        headers = _headers(call)
        directory = self._directory()
        if headers.get(_TOKEN) or "authorization" in headers:
            try:
                caller = self._calls.authenticate(work, _token(headers), call)
                return self._core.standing(caller.tenant)
            except NotAuthenticated:
                pass  # a wrong token learns as much as none
        tenants = [
            tenant
            for (tenant, dialect), entry in directory.dialects.items()
            if dialect is self.name and entry.enabled
        ]
        return self._core.standing(tenants[0]) if len(tenants) == 1 else Standing.SERVING

    # Errors.

    def _refused(self, error: ServiceError, work: Work) -> Answer:
        return answer_for(error, work.op, work.named_key, self._type_of)

    def _type_of(self, key: NamedKey) -> str:
        return transit_keys.type_of(key, self._core.versions(key))


# What a call says of itself.


def _headers(call: Call) -> dict[str, str]:
    """Those that matter here. DuplicateHeaderError."""
    found: dict[str, str] = {}
    for name, value in call.headers:
        if name in _WANTED:
            if name in found:
                raise DuplicateHeaderError(f"the header {name} stands twice")
            found[name] = value
    return found


def _token(headers: Mapping[str, str]) -> str:
    """The token, empty if there is none."""
    token = headers.get(_TOKEN)
    if token:
        return token
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else ""


def _below(path: str, mount: str) -> str | None:
    """What stands behind *mount* in *path*; None if it is not below it."""
    size = len(mount)
    return path[size + 1 :] if path.startswith(mount) and path[size : size + 1] == "/" else None


def _purpose(context: str, problem: str = "") -> Purpose:
    if not context:
        return _NO_CONTEXT
    try:
        return Purpose(DialectName.TRANSIT, decode_base64(context))
    except BodyError:
        if problem:
            raise BodyError(problem) from None
        raise


def _associated(data: str) -> bytes:
    """With the format's byte before it, so that a later format cannot be taken for this one."""
    if not data:
        return _FORMAT
    try:
        return _FORMAT + decode_base64(data)
    except BodyError as error:
        problem = f"unable to get associated_data/additional_data from factory[0]: {error.text}"
        raise BodyError(problem) from None


def _input(text: str) -> bytes:
    try:
        return decode_base64(text)
    except BodyError as error:
        raise BodyError(f"unable to decode input as base64: {error.text}") from None


def _wanted_version(version: int, noun: str) -> int | None:
    """None: the newest that is active."""
    if version == 0:
        return None
    if version < 0:
        raise BodyError(f"requested version for {noun} is negative")
    if version > MAX_VERSION:
        raise BodyError(f"requested version for {noun} is higher than the latest key version")
    return version


def _check_contexts(items: list[EncryptItem] | list[CiphertextItem]) -> None:
    with_context = sum(1 for item in items if item.context)
    if with_context not in {0, len(items)}:
        raise BodyError("context should be set either in all the request blocks or in none")


def _check_signatures(items: list[VerifyItem]) -> None:
    if any(item.hmac is not None for item in items):
        raise BodyError("verifying an HMAC is not supported")
    given = sum(1 for item in items if item.signature is not None)
    if given == 0:
        raise BodyError("no batch_input elements have 'signature' or 'hmac'")
    if given != len(items):
        raise BodyError("some elements of batch_input are missing 'signature'")


def _batch_status(request: _Request, asked: int, failures: int, items: int) -> int:
    """Of encrypt and decrypt. A status without a body would hide what did succeed, so it is not taken."""
    if asked and not (200 <= asked <= 599 and asked not in {204, 205, 304}):
        request.warnings.append(
            "invalid HTTP response code override from partial_failure_response_code, reverting to 400"
        )
        asked = 0
    if not failures:
        return 200
    return asked if asked and failures < items else 400


# Answers.


def _request_id() -> str:
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _answer(status: int, body: bytes) -> Answer:
    return Answer(status=status, body=body, headers=HEADERS)


def _success(
    request: _Request, data: Mapping[str, Any], ignored: list[str] | None = None, *, status: int = 200
) -> Answer:
    warnings = list(request.warnings)
    if ignored:
        names = " ".join(ignored)[:MAX_ERROR_CHARS]
        warnings.append(f"Endpoint ignored these unrecognized parameters: [{names}]")
    encode = msgspec.json.encode
    request_id = request.work.client_request_id.encode()
    return _answer(status, _SUCCESS % (request_id, encode(data), encode(warnings or None)))


def _json(status: int, document: Mapping[str, Any], *, empty: bool = False) -> Answer:
    return _answer(status, b"" if empty else msgspec.json.encode(document) + b"\n")


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
