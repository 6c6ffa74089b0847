"""The calls of a KACLS: what each reads, whom it needs, what it does with which key.

1. Tokens come first (`kacls_policy`), then the quota of the tenant that is now known, then the key, then the
   work. A stranger costs a signature's verification and no more of anyone's quota.
2. What leaves is asked for once more (`Core.finish`), also after another KACLS was waited for.
3. A call raises what it refuses for; the border (`kacls.py`) records and answers it.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from typing import Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import KeyId
from proxy.encryption_service.access import Caller
from proxy.encryption_service.call import Answer
from proxy.encryption_service.core import Core, Entry, Outcome, Ticket
from proxy.encryption_service.dialects import kacls_blob as blobs
from proxy.encryption_service.dialects import kacls_messages as messages
from proxy.encryption_service.dialects import kacls_private_keys as private_keys
from proxy.encryption_service.dialects.kacls_answers import OriginalKaclsError, answer
from proxy.encryption_service.dialects.kacls_blob import Content, Kind
from proxy.encryption_service.dialects.kacls_endpoint import MIGRATION_AUDIENCE, Kacls, Privileged, normal_url
from proxy.encryption_service.dialects.kacls_identity import Identity, KeysOfCall
from proxy.encryption_service.dialects.kacls_messages import MalformedError, Reader
from proxy.encryption_service.dialects.kacls_policy import (
    Denial,
    DeniedError,
    Grant,
    Person,
    Policy,
    Role,
    delegation_claims,
)
from proxy.encryption_service.errors import DoesNotVerify, Revoked, Stale
from proxy.encryption_service.key_states import Standing
from proxy.encryption_service.limits import Limiter
from proxy.encryption_service.model import DialectName, Op
from proxy.encryption_service.outbound import OutboundError
from proxy.encryption_service.tokens import KeySource
from runtime.clock import Clock

VENDOR: Final = "Sealgate"
DELEGATION_LIFETIME_S: Final = 3600.0
MIGRATION_TOKEN_S: Final = 600.0
"""Google's reference has an hour; the token is used at once, and clocks may differ by minutes."""


type Served = Answer | Awaitable[Answer]


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One call and what is known of it, for its record; filled in as it becomes known."""

    kacls: Kacls
    operation: str
    began_s: float
    body: bytes = field(repr=False)
    origin: str | None = None
    """Of the page that called, if it is allowed."""
    caller: Caller | None = None
    version: int = 0
    key_id: KeyId | None = None
    key: str = ""
    resource: str = ""
    reason: str = ""
    detail: dict[str, str] = field(default_factory=dict)
    waited_s: float = 0.0
    recorded: bool = False

    def granted(self, grant: Grant) -> None:
        self.resource = grant.resource_name
        self.detail["role"] = grant.role
        if grant.perimeter_id:
            self.detail["perimeter"] = grant.perimeter_id
        if grant.delegated_to:
            self.detail["delegated_to"] = grant.delegated_to

    def entry(self, now_s: float, outcome: Outcome = Outcome.OK, error: str = "", *, items: int = 1) -> Entry:
        return Entry(
            dialect=DialectName.KACLS,
            operation=self.operation,
            tenant=self.kacls.tenant,
            key=self.key,
            version=self.version,
            key_id=self.key_id,
            caller="" if self.caller is None else self.caller.name,
            resource=self.resource,
            reason=self.reason,
            outcome=outcome,
            error=error,
            items=items,
            latency_us=int((now_s - self.began_s - self.waited_s) * 1e6),
            detail=self.detail,
        )


class KaclsCalls:
    """Every call by its name, for every KACLS of the directory."""

    def __init__(
        self,
        *,
        core: Core,
        limiter: Limiter,
        clock: Clock,
        issuer_keys: KeySource,
        post: Callable[[str, bytes], Awaitable[tuple[int, bytes]]],
        is_current: Callable[[Kacls], bool],
    ) -> None:
        """*post*: an HTTPS request with a JSON body, answered by status and body; OutboundError.

        *is_current*: whether the endpoint is still set up as it was when the call came.
        """
        self._core = core
        self._limiter = limiter
        self._clock = clock
        self._issuer_keys = issuer_keys
        self._post = post
        self._is_current = is_current
        self._identity: Final = Identity(core)
        self._version: Final = installed_version("sealgate")
        self.operations: Final[Mapping[str, tuple[str, Callable[[Exchange], Served]]]] = {
            "status": ("GET", self._status),
            "certs": ("GET", self._certs),
            "wrap": ("POST", self._wrap),
            "unwrap": ("POST", self._unwrap),
            "digest": ("POST", self._digest),
            "rewrap": ("POST", self._rewrap),
            "delegate": ("POST", self._delegate),
            "privatekeydecrypt": ("POST", self._private_key_decrypt),
            "privatekeysign": ("POST", self._private_key_sign),
            Privileged.WRAP.value: ("POST", self._privileged_wrap),
            Privileged.UNWRAP.value: ("POST", self._privileged_unwrap),
            Privileged.PRIVATE_KEY_DECRYPT.value: ("POST", self._privileged_private_key_decrypt),
            Privileged.WRAP_PRIVATE_KEY.value: ("POST", self._wrap_private_key),
        }
        """Method, and what serves it: raises EXPECTED, or KeysNeededError before anything was done."""

    def _policy(self, exchange: Exchange) -> Policy:
        kacls = exchange.kacls
        keys = KeysOfCall(kacls, self._identity, self._issuer_keys)
        return Policy(kacls, keys, self._clock.wall_s())

    def _known(self, exchange: Exchange, name: str) -> Caller:
        """Rule 1: from here on it is somebody's call. QuotaExceeded."""
        caller = Caller(tenant=exchange.kacls.tenant, dialect=DialectName.KACLS, name=name)
        exchange.caller = caller
        self._limiter.admit(caller.tenant, None)
        return caller

    def _both(self, exchange: Exchange, authentication: str, authorization: str, *roles: Role) -> "_Pair":
        """The two tokens of a person's call, for the same person. DeniedError, QuotaExceeded."""
        policy = self._policy(exchange)
        person = policy.authenticate(authentication)
        grant = policy.authorize(authorization, *roles)
        caller = self._known(exchange, person.email)
        exchange.granted(grant)
        policy.same_user(person, grant)
        return _Pair(policy, person, grant, caller)

    def _leave(self, exchange: Exchange, caller: Caller, op: Op) -> Ticket:
        """Leave to use the wrapping key. The errors of `Core.find` and `Core.admit`."""
        exchange.key = exchange.kacls.endpoint.wrapping_key
        return self._core.admit(caller, self._core.states.find(caller.tenant, exchange.key), op)

    def _sealed(self, exchange: Exchange, ticket: Ticket, kind: Kind, content: Content) -> str:
        blob = blobs.seal(self._core, ticket, kind, content)
        exchange.version, exchange.key_id = blob.version, blob.key_id
        return messages.encoded(blob.data)

    def _opened(self, exchange: Exchange, caller: Caller, kind: Kind, data: bytes) -> tuple[Content, Ticket]:
        try:
            parsed = blobs.parse(data)
        except FormatError:
            raise DoesNotVerify from None
        exchange.version = parsed.version
        ticket = self._leave(exchange, caller, Op.DECRYPT)
        content = blobs.unseal(self._core, ticket, kind, parsed)
        if content.perimeter_id:
            exchange.detail["perimeter"] = content.perimeter_id
        return content, ticket

    def _finished(self, exchange: Exchange, ticket: Ticket, members: dict[str, object]) -> Answer:
        """Everything asked again, and recorded; then the answer."""
        exchange.recorded = True
        self._core.finish(ticket, exchange.entry(self._clock.boot_s()))
        return answer(200, messages.written(members), exchange.origin)

    # Calls that anyone may make.

    def _status(self, exchange: Exchange) -> Answer:
        kacls = exchange.kacls
        key = self._core.states.find(kacls.tenant, kacls.endpoint.wrapping_key)
        match self._core.states.standing(kacls.tenant, key):
            case Standing.REVOKED:
                raise Revoked("the keys were withdrawn by their owner")
            case Standing.STALE:
                raise Stale("no valid key is here at the moment")
            case _:
                pass
        signs = kacls.endpoint.signing_key is not None
        members: dict[str, object] = {
            "server_type": "KACLS",
            "vendor_id": VENDOR,
            "version": self._version,
            "name": kacls.tenant,
            "operations_supported": [
                name for name in self.operations if name != "status" and (signs or name not in _SIGNING)
            ],
        }
        return answer(200, messages.written(members), exchange.origin)

    def _certs(self, exchange: Exchange) -> Answer:
        return answer(200, messages.written(self._identity.key_set(exchange.kacls)), exchange.origin)

    # Calls with both tokens.

    def _wrap(self, exchange: Exchange) -> Answer:
        request = _WRAP.read(exchange.body)
        exchange.reason = request.reason
        data_key = messages.decoded("key", request.key, messages.MAX_KEY_BYTES)
        pair = self._both(exchange, request.authentication, request.authorization, Role.WRITER, Role.UPGRADER)
        pair.policy.same_delegation(pair.person, pair.grant)
        pair.policy.within(pair.person, pair.grant.perimeter_id)
        ticket = self._leave(exchange, pair.caller, Op.ENCRYPT)
        content = _content(data_key, pair.grant.resource_name, pair.grant.perimeter_id)
        wrapped = self._sealed(exchange, ticket, Kind.DATA_KEY, content)
        return self._finished(exchange, ticket, {"wrapped_key": wrapped})

    def _unwrap(self, exchange: Exchange) -> Answer:
        request = _UNWRAP.read(exchange.body)
        exchange.reason = request.reason
        blob = _wrapped_key(request.wrapped_key)
        pair = self._both(exchange, request.authentication, request.authorization, Role.READER, Role.WRITER)
        pair.policy.same_delegation(pair.person, pair.grant)
        content, ticket = self._opened(exchange, pair.caller, Kind.DATA_KEY, blob)
        _check_resource(content, pair.grant.resource_name)
        pair.policy.within(pair.person, content.perimeter_id)
        return self._finished(exchange, ticket, {"key": messages.encoded(content.secret)})

    def _private_key_decrypt(self, exchange: Exchange) -> Answer:
        request = _PRIVATE_KEY_DECRYPT.read(exchange.body)
        exchange.reason = request.reason
        blob, ciphertext, label = _decryption(request)
        pair = self._both(exchange, request.authentication, request.authorization, Role.DECRYPTER)
        pair.policy.same_delegation(pair.person, pair.grant)
        content, ticket = self._opened(exchange, pair.caller, Kind.PRIVATE_KEY, blob)
        self._check_private_key(exchange, pair, content)
        data_key = private_keys.decrypt(content.secret, request.algorithm, ciphertext, label)
        return self._finished(exchange, ticket, {"data_encryption_key": messages.encoded(data_key)})

    def _private_key_sign(self, exchange: Exchange) -> Answer:
        request = _PRIVATE_KEY_SIGN.read(exchange.body)
        exchange.reason = request.reason
        digest = messages.decoded("digest", request.digest, messages.MAX_DIGEST_BYTES, unpadded=True)
        blob = _wrapped_private_key(request.wrapped_private_key)
        pair = self._both(exchange, request.authentication, request.authorization, Role.SIGNER)
        pair.policy.same_delegation(pair.person, pair.grant)
        content, ticket = self._opened(exchange, pair.caller, Kind.PRIVATE_KEY, blob)
        self._check_private_key(exchange, pair, content)
        signature = private_keys.sign(content.secret, request.algorithm, digest, request.rsa_pss_salt_length)
        return self._finished(exchange, ticket, {"signature": messages.encoded(signature)})

    def _check_private_key(self, exchange: Exchange, pair: "_Pair", content: Content) -> None:
        """That Google has authorized the use of this very key, and the perimeter admits the person."""
        members = pair.grant.claims.members
        _check_spki(content, members.get("spki_hash"), members.get("spki_hash_algorithm"))
        message_id = members.get("message_id")
        if isinstance(message_id, str) and message_id:
            exchange.detail["message_id"] = message_id
        pair.policy.within(pair.person, content.perimeter_id)

    def _delegate(self, exchange: Exchange) -> Answer:
        request = _DELEGATE.read(exchange.body)
        exchange.reason = request.reason
        pair = self._both(exchange, request.authentication, request.authorization)
        delegated_to = pair.policy.may_delegate(pair.person, pair.grant)
        pair.policy.within(pair.person, pair.grant.perimeter_id)
        claims = delegation_claims(
            pair.policy,
            pair.person,
            pair.grant,
            url=exchange.kacls.url,
            delegated_to=delegated_to,
            now_s=self._clock.wall_s(),
            lifetime_s=DELEGATION_LIFETIME_S,
        )
        exchange.key = exchange.kacls.endpoint.signing_key or ""
        token, ticket, version = self._identity.sign(exchange.kacls, pair.caller, claims)
        exchange.version, exchange.key_id = version.version, version.key_id
        return self._finished(exchange, ticket, {"delegated_authentication": token})

    # Calls with Google's token alone.

    def _digest(self, exchange: Exchange) -> Answer:
        request = _DIGEST.read(exchange.body)
        exchange.reason = request.reason
        blob = _wrapped_key(request.wrapped_key)
        grant = self._policy(exchange).authorize(request.authorization, Role.VERIFIER)
        caller = self._known(exchange, grant.email)
        exchange.granted(grant)
        content, ticket = self._opened(exchange, caller, Kind.DATA_KEY, blob)
        _check_resource(content, grant.resource_name)
        check = _key_hash(content, grant.resource_name)
        return self._finished(exchange, ticket, {"resource_key_hash": check})

    def _rewrap(self, exchange: Exchange) -> Awaitable[Answer]:
        request = _REWRAP.read(exchange.body)
        exchange.reason = request.reason
        messages.bounded("wrapped_key", request.wrapped_key, messages.MAX_BODY_BYTES, empty=False)
        policy = self._policy(exchange)
        grant = policy.authorize(request.authorization, Role.MIGRATOR)
        caller = self._known(exchange, grant.email)
        exchange.granted(grant)
        original = normal_url(request.original_kacls_url)
        exchange.detail["original_kacls"] = original
        if original not in exchange.kacls.sources:  # the only URLs that are ever called
            raise DeniedError(Denial.ORIGINAL_KACLS)
        policy.known_perimeter(grant.perimeter_id)
        leave = _Migration(caller, self._leave(exchange, caller, Op.ENCRYPT), grant, original)
        return self._migrate(exchange, leave, request.wrapped_key)

    async def _migrate(self, exchange: Exchange, leave: "_Migration", wrapped_key: str) -> Answer:
        resource_name = leave.grant.resource_name
        data_key = await self._fetch_key(exchange, leave, wrapped_key)
        if not self._is_current(exchange.kacls):  # whom it believed may be believed no more
            raise DeniedError(Denial.ORIGINAL_KACLS, "settings-changed")
        content = _content(data_key, resource_name, leave.grant.perimeter_id)
        members: dict[str, object] = {
            "resource_key_hash": _key_hash(content, resource_name),
            "wrapped_key": self._sealed(exchange, leave.ticket, Kind.DATA_KEY, content),
        }
        return self._finished(exchange, leave.ticket, members)

    async def _fetch_key(self, exchange: Exchange, leave: "_Migration", wrapped_key: str) -> bytes:
        """The data key, unwrapped by the KACLS that has it. OriginalKaclsError; QuotaExceeded."""
        resource_name = leave.grant.resource_name
        now_s = self._clock.wall_s()
        claims = {
            "iss": exchange.kacls.url,
            "aud": MIGRATION_AUDIENCE,
            "kacls_url": leave.original,
            "resource_name": resource_name,
            "iat": int(now_s),
            "exp": int(now_s + MIGRATION_TOKEN_S),
        }
        token, _ticket, _version = self._identity.sign(exchange.kacls, leave.caller, claims)
        body = messages.written(
            {
                "authentication": token,
                "reason": exchange.reason,
                "resource_name": resource_name,
                "wrapped_key": wrapped_key,
            }
        )
        with self._limiter.hold(leave.caller.tenant, None):
            asked_s = self._clock.boot_s()
            try:
                status, given = await self._post(f"{leave.original}/{Privileged.UNWRAP}", body)
            except OutboundError as error:
                raise OriginalKaclsError(503, str(error)) from None
            finally:
                exchange.waited_s = self._clock.boot_s() - asked_s
        if status != 200:
            exchange.detail["cause"] = f"answered-{status}"
            final = 400 <= status < 500 and status not in (408, 429)
            raise OriginalKaclsError(403 if final else 503, "the original KACLS has refused")
        try:
            key = msgspec.json.decode(given, type=_Unwrapped).key
            return messages.decoded("key", key, messages.MAX_KEY_BYTES)
        except (msgspec.MsgspecError, ValueError, RecursionError, MalformedError):
            raise OriginalKaclsError(502, "the original KACLS has not answered with a key") from None

    # Calls of admins, and of a KACLS that migrates away from here.

    def _privileged(
        self, exchange: Exchange, authentication: str, call: Privileged, resource_name: str = ""
    ) -> tuple[Policy, Caller]:
        policy = self._policy(exchange)
        admin = policy.privileged(authentication, call, resource_name=resource_name)
        exchange.detail["as"] = "kacls" if admin.is_kacls else "admin"
        return policy, self._known(exchange, admin.name)

    def _privileged_wrap(self, exchange: Exchange) -> Answer:
        request = _PRIVILEGED_WRAP.read(exchange.body)
        exchange.reason, exchange.resource = request.reason, _resource(request.resource_name)
        perimeter_id = _perimeter(request.perimeter_id)
        data_key = messages.decoded("key", request.key, messages.MAX_KEY_BYTES)
        policy, caller = self._privileged(exchange, request.authentication, Privileged.WRAP)
        policy.known_perimeter(perimeter_id)
        ticket = self._leave(exchange, caller, Op.ENCRYPT)
        content = _content(data_key, request.resource_name, perimeter_id)
        wrapped = self._sealed(exchange, ticket, Kind.DATA_KEY, content)
        return self._finished(exchange, ticket, {"wrapped_key": wrapped})

    def _privileged_unwrap(self, exchange: Exchange) -> Answer:
        request = _PRIVILEGED_UNWRAP.read(exchange.body)
        exchange.reason, exchange.resource = request.reason, _resource(request.resource_name)
        blob = _wrapped_key(request.wrapped_key)
        _policy, caller = self._privileged(
            exchange, request.authentication, Privileged.UNWRAP, request.resource_name
        )
        content, ticket = self._opened(exchange, caller, Kind.DATA_KEY, blob)
        _check_resource(content, request.resource_name)
        return self._finished(exchange, ticket, {"key": messages.encoded(content.secret)})

    def _privileged_private_key_decrypt(self, exchange: Exchange) -> Answer:
        request = _PRIVILEGED_PRIVATE_KEY_DECRYPT.read(exchange.body)
        exchange.reason = request.reason
        blob, ciphertext, label = _decryption(request)
        _policy, caller = self._privileged(exchange, request.authentication, Privileged.PRIVATE_KEY_DECRYPT)
        content, ticket = self._opened(exchange, caller, Kind.PRIVATE_KEY, blob)
        _check_spki(content, request.spki_hash, request.spki_hash_algorithm)
        data_key = private_keys.decrypt(content.secret, request.algorithm, ciphertext, label)
        return self._finished(exchange, ticket, {"data_encryption_key": messages.encoded(data_key)})

    def _wrap_private_key(self, exchange: Exchange) -> Answer:
        request = _WRAP_PRIVATE_KEY.read(exchange.body)
        exchange.reason = request.reason
        perimeter_id = _perimeter(request.perimeter_id)
        der = messages.decoded("private_key", request.private_key, blobs.MAX_SECRET_BYTES)
        policy, caller = self._privileged(exchange, request.authentication, Privileged.WRAP_PRIVATE_KEY)
        policy.known_perimeter(perimeter_id)
        pkcs8, binding = private_keys.admit(der)
        exchange.detail["spki_hash"] = binding.hex()
        ticket = self._leave(exchange, caller, Op.ENCRYPT)
        content = Content(binding=binding, perimeter_id=perimeter_id, secret=pkcs8)
        wrapped = self._sealed(exchange, ticket, Kind.PRIVATE_KEY, content)
        return self._finished(exchange, ticket, {"wrapped_private_key": wrapped})


@dataclass(frozen=True, slots=True)
class _Pair:
    """A person's call whose two tokens fit each other."""

    policy: Policy
    person: Person
    grant: Grant
    caller: Caller


@dataclass(frozen=True, slots=True)
class _Migration:
    """Leave to wrap here what the KACLS at `original` unwraps."""

    caller: Caller
    ticket: Ticket
    grant: Grant
    original: str


class _Unwrapped(msgspec.Struct, frozen=True):
    """What a KACLS answers to `privilegedunwrap`."""

    key: str


PUBLIC: Final = frozenset({"status", "certs"})
_SIGNING: Final = frozenset({"certs", "delegate", "rewrap"})
_WRAP: Final = Reader(messages.Wrap)
_UNWRAP: Final = Reader(messages.Unwrap)
_DIGEST: Final = Reader(messages.Digest)
_REWRAP: Final = Reader(messages.Rewrap)
_DELEGATE: Final = Reader(messages.Delegate)
_PRIVATE_KEY_DECRYPT: Final = Reader(messages.PrivateKeyDecrypt)
_PRIVATE_KEY_SIGN: Final = Reader(messages.PrivateKeySign)
_PRIVILEGED_WRAP: Final = Reader(messages.PrivilegedWrap)
_PRIVILEGED_UNWRAP: Final = Reader(messages.PrivilegedUnwrap)
_PRIVILEGED_PRIVATE_KEY_DECRYPT: Final = Reader(messages.PrivilegedPrivateKeyDecrypt)
_WRAP_PRIVATE_KEY: Final = Reader(messages.WrapPrivateKey)


# What is read.


def _wrapped_key(text: str) -> bytes:
    return messages.wrapped("wrapped_key", text, messages.MAX_WRAPPED_KEY_CHARS)


def _wrapped_private_key(text: str) -> bytes:
    return messages.wrapped("wrapped_private_key", text, messages.MAX_WRAPPED_PRIVATE_KEY_CHARS)


def _resource(name: str) -> str:
    return messages.bounded("resource_name", name, messages.MAX_RESOURCE_BYTES, empty=False)


def _perimeter(perimeter_id: str) -> str:
    return messages.bounded("perimeter_id", perimeter_id, messages.MAX_PERIMETER_BYTES)


def _decryption(
    request: messages.PrivateKeyDecrypt | messages.PrivilegedPrivateKeyDecrypt,
) -> tuple[bytes, bytes, bytes]:
    """Blob, ciphertext and OAEP label."""
    label = request.rsa_oaep_label
    return (
        _wrapped_private_key(request.wrapped_private_key),
        messages.decoded(
            "encrypted_data_encryption_key",
            request.encrypted_data_encryption_key,
            messages.MAX_ENCRYPTED_KEY_BYTES,
        ),
        messages.decoded("rsa_oaep_label", label, messages.MAX_LABEL_BYTES) if label else b"",
    )


# What is bound.


def _content(data_key: bytes, resource_name: str, perimeter_id: str) -> Content:
    binding = blobs.resource_binding(resource_name)
    return Content(binding=binding, perimeter_id=perimeter_id, secret=data_key)


def _check_resource(content: Content, resource_name: str) -> None:
    if not content.is_of_resource(resource_name):
        raise DeniedError(Denial.RESOURCE)


def _check_spki(content: Content, claimed: object, algorithm: object) -> None:
    if algorithm != "SHA-256" or not isinstance(claimed, str):
        raise DeniedError(Denial.SPKI, "spki-hash-missing")
    # Tokens write base64url or base64, with padding or without; one meaning.
    text = claimed.rstrip("=").replace("-", "+").replace("_", "/")
    if messages.encoded(content.binding).rstrip("=") != text:
        raise DeniedError(Denial.SPKI)


def _key_hash(content: Content, resource_name: str) -> str:
    return messages.encoded(blobs.resource_key_hash(content.secret, resource_name, content.perimeter_id))


# What is answered.
