"""The native API: JSON over named keys, streams for large bodies (docs/encryption-service-native.md).

1. A bearer token names the tenant; without one nothing is told but the OpenAPI document.
2. Every error is a problem document; within a batch what concerns one item is that item's error, what
   concerns the key or the tenant ends the call.
3. Paths are compared as received: nothing is decoded, no name needs an escape.
4. A ciphertext carries its version; key, version, context and aad are bound by it.
"""

import re
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, Final, override

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from envelope.errors import KeyUnavailableError
from envelope.keys import KeyUse
from proxy.encryption_service.access import Access, Caller
from proxy.encryption_service.call import Answer, Call, DuplicateHeaderError, StreamingAnswer
from proxy.encryption_service.core import Core, Purpose, Ticket
from proxy.encryption_service.dialects import native_bodies as bodies
from proxy.encryption_service.dialects.bearer import BearerCalls, Work
from proxy.encryption_service.dialects.dialect import Dialect, Trouble
from proxy.encryption_service.dialects.native_bodies import Ciphertext, MalformedError, Reader
from proxy.encryption_service.dialects.native_errors import (
    HEADERS,
    MALFORMED,
    MEDIA_TYPE,
    METHOD,
    NOT_FOUND,
    SEALED_OBJECT,
    RefusedError,
    problem,
    row_of,
    row_of_trouble,
)
from proxy.encryption_service.dialects.native_objects import NativeObjects
from proxy.encryption_service.dialects.native_openapi import (
    JSON_CALLS,
    PREFIX,
    TENANT_CALLS,
    WELL_KNOWN_KEYS,
    document_bytes,
)
from proxy.encryption_service.dialects.native_streams import Pieces, Stream
from proxy.encryption_service.dialects.native_tokens import NativeTokens, key_set_answer
from proxy.encryption_service.errors import (
    DoesNotVerify,
    InputRefused,
    KeyRefused,
    ServiceError,
    TooLarge,
)
from proxy.encryption_service.key_states import KeyVersion
from proxy.encryption_service.limits import Limiter
from proxy.encryption_service.model import DialectName, NamedKey, NativeSettings, Op, ServiceDirectory
from proxy.encryption_service.signatures import SignatureScheme
from runtime.clock import Clock

MAX_BODY_BYTES: Final = 32 << 20
SEALED_TYPE: Final = "application/octet-stream"

_BIG_BODY_BYTES: Final = 64 * 1024
_MAX_COMMAS: Final = 32 * bodies.MAX_ITEMS
_PATH: Final = re.compile(
    re.escape(PREFIX) + r"/keys/(?P<key>[a-z0-9][a-z0-9-]{0,62})"
    r"(?:/(?P<call>encrypt|decrypt|reencrypt|generate-data-key|sign|verify|seal|open)(?P<batch>/batch)?)?"
)
_PUBLISHED: Final = re.compile(re.escape(PREFIX) + r"/jwks/(?P<tenant>[a-z0-9][a-z0-9-]{0,62})")
_STREAMS: Final = frozenset({"seal", "open"})
_BOUND_NAME: Final = re.compile(r"[!-~](?:[ -~]{0,510}[!-~])?")
_CACHED: Final = (("cache-control", "max-age=300"),)
_NO_CONTEXT: Final = Purpose(DialectName.NATIVE)
_OPS: Final = {
    "encrypt": Op.ENCRYPT,
    "decrypt": Op.DECRYPT,
    "reencrypt": Op.REWRAP,
    "generate-data-key": Op.GENERATE,
    "sign": Op.SIGN,
    "verify": Op.VERIFY,
    "seal": Op.ENCRYPT,
    "open": Op.DECRYPT,
}
_ITEM_ERRORS: Final = (DoesNotVerify, KeyRefused, InputRefused, TooLarge)
_DATA_ALGORITHM: Final = "XAES-256-GCM"

type Serve = Callable[["_Request", Any], Any]


class _Request:
    """One call while it is served."""

    __slots__ = ("caller", "sources", "ticket", "work")

    def __init__(self, work: Work, caller: Caller, ticket: Ticket) -> None:
        self.work = work
        self.caller = caller
        self.ticket = ticket
        self.sources: dict[str, Ticket] = {}


class NativeDialect(Dialect):
    """`/sealgate/v1/...` for all tenants that have the native API switched on."""

    name = DialectName.NATIVE

    def __init__(
        self,
        *,
        core: Core,
        access: Access,
        limiter: Limiter,
        directory: Callable[[], ServiceDirectory],
        clock: Clock,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self._core = core
        self._directory = directory
        self._calls = BearerCalls(
            self.name, core=core, access=access, limiter=limiter, directory=directory, clock=clock
        )
        self._document = Answer(
            status=200, body=document_bytes(), headers=(("cache-control", "max-age=300"),)
        )
        self._readers: dict[str, Reader[Any]] = {}
        self._batch_readers: dict[str, Reader[Any]] = {}
        for name, json_call in JSON_CALLS.items():
            self._readers[name] = Reader(json_call.request)
            if json_call.batch is not None:
                self._batch_readers[name] = Reader(json_call.batch)
        self._objects = NativeObjects(self._calls)
        self._tokens = NativeTokens(self._calls)
        self._of_tenant: dict[str, Callable[[Work, Caller, Any], msgspec.Struct]] = {
            "encrypt": self._objects.encrypt,
            "decrypt": self._decrypt_any,
            "token": self._tokens.issue,
            "token/verify": self._tokens.verify,
        }
        self._tenant_readers: dict[str, Reader[Any]] = {
            name: Reader(tenant_call.request) for name, tenant_call in TENANT_CALLS.items()
        }
        self._serve: dict[str, Serve] = {
            "encrypt": self._encrypt,
            "decrypt": self._decrypt,
            "reencrypt": self._reencrypt,
            "generate-data-key": self._generate,
            "sign": self._sign,
            "verify": self._verify,
        }

    @override
    def claims(self, path: str) -> bool:
        return path.startswith(f"{PREFIX}/") or path in {PREFIX, "/openapi.json", WELL_KNOWN_KEYS}

    @override
    def wants_stream(self, method: str, path: str) -> bool:
        found = _PATH.fullmatch(path)
        return method == "POST" and found is not None and found["call"] in _STREAMS and not found["batch"]

    @override
    def tenant_of(self, call: Call) -> str:
        try:
            return self._calls.tenant_of(_token_of(call), call)
        except DuplicateHeaderError:
            return ""

    @override
    def handle(self, call: Call) -> Answer | Awaitable[Answer | StreamingAnswer]:
        if call.body_stream is not None:
            return self._stream(call)
        return self._guarded(call, self._calls.begin())

    @override
    def refuse(self, trouble: Trouble, call: Call | None, detail: str = "") -> Answer:
        return problem(row_of_trouble(trouble), detail=detail)

    def _guarded(self, call: Call, work: Work) -> Answer:
        try:
            try:
                return self._answer(call, work)
            except RefusedError as error:
                self._calls.record_refusal(work, error.row.code)
                return problem(error.row, detail=error.detail, headers=error.headers)
            except ServiceError as error:
                self._calls.record_refusal(work, error)
                return problem(row_of(error))
        except ServiceError as error:  # NotRecorded: nothing else may be answered
            return problem(row_of(error))

    # Finding what is asked.

    def _answer(self, call: Call, work: Work) -> Answer:
        path, method = call.path, call.method
        if path in {"/openapi.json", f"{PREFIX}/openapi.json"}:
            _check_method(method, "GET", "HEAD")
            return self._document
        published = _PUBLISHED.fullmatch(path)
        if published is not None:
            return self._published(work, published["tenant"], method)
        caller = self._authenticated(call, work)
        found = _PATH.fullmatch(path)
        if found is None:
            what = path.removeprefix(f"{PREFIX}/")
            if what in self._of_tenant:
                return self._tenant_call(caller, work, what, call)
            return self._look(caller, work, path, method)
        name, what = found["key"], found["call"]
        work.key = name
        if what is None:
            _check_method(method, "GET")
            return self._describe(caller, work, name)
        work.operation = what
        if found["batch"] and what not in self._batch_readers:
            raise RefusedError(NOT_FOUND)
        _check_method(method, "POST")
        if what in _STREAMS:  # the HTTP layer streams these; whoever does not has sent no body
            raise RefusedError(MALFORMED, "This call needs a body.")
        _check_json(call)
        _check_size(call.body)
        return (
            self._batch(caller, work, name, what, call.body)
            if found["batch"]
            else self._one(caller, work, name, what, call.body)
        )

    def _tenant_call(self, caller: Caller, work: Work, what: str, call: Call) -> Answer:
        work.operation = what.replace("/", "-")
        _check_method(call.method, "POST")
        _check_json(call)
        _check_size(call.body)
        asked = _read(self._tenant_readers[what], call.body)
        return _json(self._of_tenant[what](work, caller, asked))

    def _decrypt_any(
        self, work: Work, caller: Caller, asked: bodies.TenantDecryptRequest
    ) -> bodies.TenantDecrypted:
        settings = self._settings(caller.tenant)
        return self._objects.decrypt(work, caller, asked, max_tried=settings.max_try_all)

    def _settings(self, tenant: str) -> NativeSettings:
        entry = self._directory().dialect(tenant, self.name)
        return entry.settings if entry and isinstance(entry.settings, NativeSettings) else NativeSettings()

    def _published(self, work: Work, tenant: str, method: str) -> Answer:
        """What the tenant's setting lets anybody see. Nobody is told which tenants there are."""
        work.operation = "published-keys"
        _check_method(method, "GET", "HEAD")
        names = self._settings(tenant).published_keys if self._directory().dialect(tenant, self.name) else ()
        keys = [key for name in names if (key := self._directory().key(tenant, name)) is not None]
        if not keys:
            raise RefusedError(NOT_FOUND)
        return key_set_answer(self._tokens.key_set(tenant, keys))

    def _authenticated(self, call: Call, work: Work) -> Caller:
        """NotAuthenticated, QuotaExceeded."""
        try:
            token = _token_of(call)
            work.client_request_id = call.header("x-request-id") or ""
        except DuplicateHeaderError as error:
            raise RefusedError(MALFORMED, f"{error}.") from None
        return self._calls.authenticate(work, token, call)

    def _one(self, caller: Caller, work: Work, name: str, what: str, body: bytes) -> Answer:
        read = _read(self._readers[what], body)
        request = self._admitted(caller, work, name, what)
        answer = self._serve[what](request, read)
        self._finish(request)
        return _json(answer)

    def _batch(self, caller: Caller, work: Work, name: str, what: str, body: bytes) -> Answer:
        items = _read(self._batch_readers[what], body).items
        self._calls.admit_batch(work, len(items))
        request = self._admitted(caller, work, name, what)
        serve = self._serve[what]
        results: list[bodies.Result[Any]] = []
        failed = 0
        for item in items:
            try:
                results.append(bodies.Result(result=serve(request, item), reference=item.reference))
            except RefusedError as error:
                failed += 1
                problem_of_item = bodies.ItemError(
                    code=error.row.code, detail=error.detail or error.row.detail
                )
                results.append(bodies.Result(error=problem_of_item, reference=item.reference))
            except _ITEM_ERRORS as error:
                failed += 1
                row = row_of(error)
                problem_of_item = bodies.ItemError(code=row.code, detail=row.detail)
                results.append(bodies.Result(error=problem_of_item, reference=item.reference))
        self._finish(request)
        return _json(bodies.BatchAnswer(results=results, failed=failed))

    def _admitted(self, caller: Caller, work: Work, name: str, what: str) -> _Request:
        work.operation = what
        return _Request(work, caller, self._calls.admit(work, caller, name, _OPS[what]))

    def _finish(self, request: _Request) -> None:
        for source in request.sources.values():
            self._core.confirm(source)
        self._calls.finish(request.work, request.ticket)

    # What is done with a key.

    def _encrypt(self, request: _Request, asked: bodies.EncryptRequest) -> bodies.Encrypted:
        return self._encrypted(request, asked.plaintext, asked.aad, _purpose(asked.context))

    def _encrypted(
        self, request: _Request, plaintext: bytes, aad: bytes, purpose: Purpose
    ) -> bodies.Encrypted:
        sealed = self._core.encrypt(request.ticket, plaintext, bodies.FORMAT + aad, purpose=purpose)
        request.work.used(sealed.version, sealed.key_id)
        return bodies.Encrypted(
            key=request.ticket.key.name,
            version=sealed.version,
            ciphertext=bodies.pack(sealed.version, sealed.nonce, sealed.ciphertext, sealed.tag),
        )

    def _decrypt(self, request: _Request, asked: bodies.DecryptRequest) -> bodies.Decrypted:
        version, plaintext = self._decrypted(request.ticket, request.work, asked)
        return bodies.Decrypted(key=request.ticket.key.name, version=version, plaintext=plaintext)

    def _decrypted(self, ticket: Ticket, work: Work, asked: bodies.DecryptRequest) -> tuple[int, bytes]:
        parsed = Ciphertext.parse(asked.ciphertext)
        if parsed is None:
            raise DoesNotVerify
        plaintext = self._core.decrypt(
            ticket,
            version=parsed.version,
            nonce=parsed.nonce,
            ciphertext=parsed.ciphertext,
            tag=parsed.tag,
            aad=bodies.FORMAT + asked.aad,
            purpose=_purpose(asked.context),
        )
        work.used(parsed.version)
        return parsed.version, plaintext

    def _reencrypt(self, request: _Request, asked: bodies.ReencryptRequest) -> bodies.Encrypted:
        source = request.ticket
        if asked.source_key is not None and asked.source_key != source.key.name:
            source = self._source(request, asked.source_key)
        _version, plaintext = self._decrypted(source, request.work, asked)
        return self._encrypted(request, plaintext, asked.aad, _purpose(asked.context))

    def _source(self, request: _Request, name: str) -> Ticket:
        found = request.sources.get(name)
        if found is None:
            destination, request.work.resource = request.work.key, f"from {name}"
            found = self._calls.admit(request.work, request.caller, name, Op.REWRAP)
            request.work.key = destination
            request.sources[name] = found
        return found

    def _generate(self, request: _Request, asked: bodies.GenerateDataKeyRequest) -> bodies.DataKey:
        data_key, sealed = self._core.generate(
            request.ticket, asked.size_bytes, bodies.FORMAT + asked.aad, purpose=_purpose(asked.context)
        )
        request.work.used(sealed.version, sealed.key_id)
        return bodies.DataKey(
            key=request.ticket.key.name,
            version=sealed.version,
            ciphertext=bodies.pack(sealed.version, sealed.nonce, sealed.ciphertext, sealed.tag),
            plaintext=None if asked.wrapped_only else data_key,
        )

    def _sign(self, request: _Request, asked: bodies.SignRequest) -> bodies.Signed:
        message, scheme = _message(asked)
        made = self._core.sign(request.ticket, message, scheme)
        request.work.used(made.version, made.key_id)
        return bodies.Signed(
            key=request.ticket.key.name,
            version=made.version,
            algorithm=str(request.ticket.key.algorithm),
            signature=made.signature,
        )

    def _verify(self, request: _Request, asked: bodies.VerifyRequest) -> bodies.Verified:
        message, scheme = _message(asked)
        try:
            self._core.verify(request.ticket, asked.version, asked.signature, message, scheme)
        except DoesNotVerify:
            valid = False
        else:
            valid = True
        request.work.used(asked.version)
        return bodies.Verified(key=request.ticket.key.name, version=asked.version, valid=valid)

    # Looking.

    def _look(self, caller: Caller, work: Work, path: str, method: str) -> Answer:
        if path == f"{PREFIX}/keys":
            work.operation = "list-keys"
            _check_method(method, "GET")
            keys = [self._description(key, caller) for key in self._calls.visible(caller)]
            self._calls.record(work)
            return _json(bodies.KeyList(keys=keys))
        if path == f"{PREFIX}/status":
            work.operation = "status"
            _check_method(method, "GET")
            standing = self._core.states.standing(caller.tenant)
            self._calls.record(work)
            return _json(bodies.Status(tenant=caller.tenant, standing=standing.value))
        if path == WELL_KNOWN_KEYS:
            work.operation = "key-set"
            _check_method(method, "GET", "HEAD")
            document = self._tokens.key_set(caller.tenant, self._calls.visible(caller))
            self._calls.record(work)
            return key_set_answer(document)
        raise RefusedError(NOT_FOUND)

    def _describe(self, caller: Caller, work: Work, name: str) -> Answer:
        work.operation = "describe-key"
        description = self._description(self._calls.describable(work, caller, name), caller)
        self._calls.record(work)
        return _json(description)

    def _description(self, key: NamedKey, caller: Caller) -> bodies.KeyDescription:
        allowed = key.operations & self._calls.operations_of(caller)
        return bodies.KeyDescription(
            name=key.name,
            use=key.use.value,
            algorithm=_DATA_ALGORITHM if key.use is KeyUse.DATA else str(key.algorithm),
            operations=sorted(op.value for op in allowed),
            blocked=key.blocked,
            standing=self._core.states.standing(key.tenant, key).value,
            versions=[_version(version) for version in self._core.states.versions(key)],
        )

    # Streams.

    async def _stream(self, call: Call) -> Answer | StreamingAnswer:
        work = self._calls.begin()
        with ExitStack() as stack:
            try:
                try:
                    return await self._streamed(call, work, stack)
                except RefusedError as error:
                    self._calls.record_refusal(work, error.row.code)
                    return problem(error.row, detail=error.detail, headers=error.headers)
                except DoesNotVerify as error:
                    self._calls.record_refusal(work, error)
                    return problem(SEALED_OBJECT)
                except ServiceError as error:
                    self._calls.record_refusal(work, error)
                    return problem(row_of(error))
            except ServiceError as error:  # NotRecorded
                return problem(row_of(error))

    async def _streamed(self, call: Call, work: Work, stack: ExitStack) -> StreamingAnswer:
        found = _PATH.fullmatch(call.path)
        if found is None or call.body_stream is None:
            raise RefusedError(NOT_FOUND)
        caller = self._authenticated(call, work)
        name = _bound_name(call)
        stack.enter_context(self._calls.hold(caller))
        request = self._admitted(caller, work, found["key"], found["call"])
        stream = Stream(
            self._calls, work, request.ticket, caller, call.body_stream, name=name.encode("ascii")
        )
        try:
            pieces = stream.seal() if found["call"] == "seal" else await stream.open()
        except KeyUnavailableError as error:  # between two looks; the second says it in the service's words
            self._core.confirm(request.ticket)
            raise DoesNotVerify from error
        return StreamingAnswer(
            status=200, chunks=Pieces(pieces, stack.pop_all()), content_type=SEALED_TYPE, headers=HEADERS
        )


def _token_of(call: Call) -> str:
    """Empty if there is none. DuplicateHeaderError."""
    scheme, _, token = (call.header("authorization") or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _read(reader: Reader[Any], body: bytes) -> Any:
    try:
        return reader.read(body)
    except MalformedError as error:
        raise RefusedError(MALFORMED, f"{error}.") from None


def _purpose(context: bytes) -> Purpose:
    return Purpose(DialectName.NATIVE, context) if context else _NO_CONTEXT


def _message(asked: bodies.SignRequest) -> tuple[bytes, SignatureScheme]:
    if (asked.message is None) == (asked.digest is None):
        raise RefusedError(MALFORMED, "Give one of message and digest.")
    scheme = SignatureScheme(
        hash_name=asked.hash,
        prehashed=asked.digest is not None,
        padding=asked.padding,
        salt_length=asked.salt_length,
        marshaling=asked.marshaling,
    )
    return (asked.message if asked.message is not None else asked.digest) or b"", scheme


def _check_method(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise RefusedError(METHOD, headers=(("allow", ", ".join(allowed)),))


def _check_json(call: Call) -> None:
    try:
        content_type = call.header("content-type")
    except DuplicateHeaderError as error:
        raise RefusedError(MALFORMED, f"{error}.") from None
    if content_type is not None and content_type.partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(MEDIA_TYPE)


def _check_size(body: bytes) -> None:
    """What a body can make of memory is bounded before it is read: by commas, which bound its values."""
    if len(body) > _BIG_BODY_BYTES and body.count(b",") > _MAX_COMMAS:
        raise RefusedError(MALFORMED, "The body has more values than a batch of 1,000 can need.")


def _bound_name(call: Call) -> str:
    try:
        name = call.header("sealgate-name")
    except DuplicateHeaderError as error:
        raise RefusedError(MALFORMED, f"{error}.") from None
    if name is None:
        return ""
    if not _BOUND_NAME.fullmatch(name):
        raise RefusedError(MALFORMED, "Sealgate-Name has 1 to 512 printable ASCII characters.")
    return name


def _version(version: KeyVersion) -> bodies.VersionDescription:
    public = version.public_key
    return bodies.VersionDescription(
        version=version.version,
        key_id=str(version.key_id),
        state=version.state.value,
        public_key=None
        if public is None
        else public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii"),
    )


def _json(document: msgspec.Struct) -> Answer:
    return Answer(status=200, body=msgspec.json.encode(document) + b"\n", headers=HEADERS)
