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

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, override
from urllib.parse import unquote

from proxy.encryption_service.access import Access, Caller
from proxy.encryption_service.call import Answer, Call, DuplicateHeaderError
from proxy.encryption_service.core import Core
from proxy.encryption_service.dialects.bearer import BearerCalls, Work
from proxy.encryption_service.dialects.dialect import Dialect, Trouble
from proxy.encryption_service.dialects.transit_bodies import BodyError
from proxy.encryption_service.dialects.transit_call import (
    WRITING,
    TransitRequest,
    headers_of,
    new_request_id,
    token_of,
)
from proxy.encryption_service.dialects.transit_data import DataOperations
from proxy.encryption_service.dialects.transit_errors import (
    UNSUPPORTED_OPERATION,
    UNSUPPORTED_PATH,
    VaultError,
    answer_for,
    errors,
)
from proxy.encryption_service.dialects.transit_keys import KeyCalls, type_of
from proxy.encryption_service.dialects.transit_signing import SigningOperations
from proxy.encryption_service.dialects.transit_system import HEALTH_CALLS, SystemCalls
from proxy.encryption_service.errors import AccessDenied, ServiceError
from proxy.encryption_service.limits import Limiter
from proxy.encryption_service.model import (
    DialectName,
    NamedKey,
    ServiceDirectory,
    TransitMount,
    TransitSettings,
)
from runtime.clock import Clock

MAX_BODY_BYTES: Final = 32 << 20
MAX_ITEMS: Final = 1000
_KNOWN_METHODS: Final = frozenset({"GET", "LIST", "POST", "PUT", "DELETE", "PATCH", "HEAD"})


class _Place(NamedTuple):
    """Where in the API a path points: below a mount of the tenant's."""

    mount: TransitMount
    operation: str
    rest: str


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
        self._calls = BearerCalls(
            self.name, core=core, access=access, limiter=limiter, directory=directory, clock=clock
        )
        self._system = SystemCalls(self._calls, directory)
        self._keys = KeyCalls(self._calls)
        data = DataOperations(self._calls, max_items=max_items)
        signing = SigningOperations(self._calls, max_items=max_items)
        self._writes: Mapping[str, Callable[[TransitRequest], Answer]] = {
            "encrypt": data.encrypt,
            "decrypt": data.decrypt,
            "rewrap": data.rewrap,
            "datakey": data.data_key,
            "sign": signing.sign,
            "verify": signing.verify,
        }

    @override
    def claims(self, path: str) -> bool:
        return path.startswith("/v1/")

    @override
    def handle(self, call: Call) -> Answer:
        work = self._calls.begin()
        request_id = new_request_id()
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
    def tenant_of(self, call: Call) -> str:
        try:
            return self._calls.tenant_of(token_of(headers_of(call)), call)
        except DuplicateHeaderError:
            return ""

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
        if path.startswith("sys/") and path[4:] in HEALTH_CALLS:
            return self._system.health(call, work, path[4:])
        headers = headers_of(call)
        caller = self._calls.authenticate(work, token_of(headers), call)
        if headers.get("x-vault-wrap-ttl", "0") not in {"0", "0s", ""}:
            raise VaultError(400, "response wrapping is not supported")
        if path.startswith("auth/token/"):
            return self._system.token_call(TransitRequest(call, work, caller, ""), path[11:])
        place = self._place(caller, headers.get("x-vault-namespace", ""), path)
        work.resource = place.mount.mount
        request = TransitRequest(call, work, caller, place.rest)
        if place.operation == "keys":
            return self._keys.serve(request)
        serve = self._writes.get(place.operation)
        if serve is None:
            raise VaultError(404, UNSUPPORTED_PATH)
        work.operation = place.operation
        if not place.rest:
            raise VaultError(400, "cannot write to a path ending in '/'")
        if call.method not in WRITING:
            raise VaultError(405, UNSUPPORTED_OPERATION)
        return serve(request)

    def _place(self, caller: Caller, namespace: str, path: str) -> _Place:
        """VaultError: no such mount of this tenant's, or one the credential is not for."""
        entry = self._directory().dialect(caller.tenant, self.name)
        if "%" in path:
            path = unquote(path, errors="replace")
        namespace = namespace.strip("/")
        settings = entry.settings if entry is not None else None
        unknown = f'no handler for route "{path}". route entry not found.'
        if isinstance(settings, TransitSettings):
            for mount in settings.mounts:
                own = mount.namespace or caller.tenant
                rest = _below(path, mount.mount)
                if rest is None and not namespace and mount.namespace is not None:
                    rest = _below(path, f"{mount.namespace}/{mount.mount}")
                if rest is None:
                    continue
                if namespace and namespace != own:  # another namespace may have a mount of this name
                    unknown = "namespace not found"
                    continue
                if caller.endpoint is not None and caller.endpoint != mount.mount:
                    raise AccessDenied("the credential is not for this mount")
                operation, slash, name = rest.partition("/")
                if not slash and operation != "keys":
                    raise VaultError(404, UNSUPPORTED_PATH)
                return _Place(mount, operation, name)
        raise VaultError(404, unknown)

    # Errors.

    def _refused(self, error: ServiceError, work: Work) -> Answer:
        return answer_for(error, work.op, work.named_key, self._type_of)

    def _type_of(self, key: NamedKey) -> str:
        return type_of(key, self._core.states.versions(key))


def _below(path: str, mount: str) -> str | None:
    """What stands behind *mount* in *path*; None if it is not below it."""
    size = len(mount)
    return path[size + 1 :] if path.startswith(mount) and path[size : size + 1] == "/" else None
