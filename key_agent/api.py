"""The agent's HTTP: commands on a socket only its user can open, status and health on loopback.

1. One table says which request is which operation; server, client (the CLI) and `/openapi.json` read it.
2. Whoever can open the socket (0600, in the 0700 `state_dir`) is the administrator. The loopback port has no
   login, so it changes nothing.
3. Errors are problem documents; `exit_code` tells the CLI what to end with.
"""

import json
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import web

from envelope.errors import SealgateError
from key_agent.agent import Agent
from key_agent.backup import MAX_FILE_BYTES, BackupError
from key_agent.commands import Json
from key_agent.environments.approvals import ApprovalError
from key_agent.environments.peer_transport import PeerError
from key_agent.environments.shared_errors import EpochGapError, RegistryTamperedError, StaleTermError
from key_agent.errors import KeySourceError
from key_agent.operations import Operations
from key_agent.registry.database import RegistryError, RegistryInUseError
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.verdict import NEXT_STEPS, Verdict
from key_agent.state_dir import StateLockedError
from runtime.cli import CommandError, ExitCode, explain
from runtime.observe import REGISTRY
from runtime.serve import (
    ProblemError,
    health_routes,
    make_application,
    openapi_route,
    problem_response,
    running,
)

PROGRAM: Final = "key-agent"
_SLOW_S: Final = 300.0
_GRACE_S: Final = 60.0
"""For commands that run when the agent is asked to stop."""
# A backup's content, in base64.
_MAX_COMMAND_BYTES: Final = 2 * MAX_FILE_BYTES


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of an operation that do not stand in the path."""


class Nothing(_Body, frozen=True, forbid_unknown_fields=True):
    pass


class NewKek(_Body, frozen=True, forbid_unknown_fields=True):
    kek_type: str | None = None
    valid_days: int | None = None
    hsm_label: str | None = None
    hsm_id: str | None = None


class Reinstate(NewKek, frozen=True, forbid_unknown_fields=True):
    restore: bool = False


class ServiceAdd(_Body, frozen=True, forbid_unknown_fields=True):
    proxy: str
    certificate_pem: str
    use: str = "data"
    algorithm: str | None = None


class ServiceSet(_Body, frozen=True, forbid_unknown_fields=True):
    rotate_after_days: int | None


class EncryptPolicy(_Body, frozen=True, forbid_unknown_fields=True):
    policy: str
    key: str | None = None
    home: str | None = None


class Reason(_Body, frozen=True, forbid_unknown_fields=True):
    reason: str | None = None


class Destroy(Reason, frozen=True, forbid_unknown_fields=True):
    confirm: str = ""
    """The key id, once more."""


class IncidentOpen(_Body, frozen=True, forbid_unknown_fields=True):
    environment: str
    kind: str
    reason: str
    since_ms: int | None = None
    keys: tuple[str, ...] = ()
    service: str | None = None
    keep_keys: bool = False
    idempotency_key: str | None = None
    by: str = ""


class ApprovedKeys(_Body, frozen=True, forbid_unknown_fields=True):
    keys: tuple[str, ...]
    approval: str


class Rekey(_Body, frozen=True, forbid_unknown_fields=True):
    generator: str | None = None


class Approved(_Body, frozen=True, forbid_unknown_fields=True):
    approval: str


class Rescue(ApprovedKeys, frozen=True, forbid_unknown_fields=True, kw_only=True):
    incident: str
    until_ms: int


class Retire(ApprovedKeys, frozen=True, forbid_unknown_fields=True):
    accept_loss: bool = False


class ReencryptionBegin(_Body, frozen=True, forbid_unknown_fields=True):
    connector: str
    service: str | None = None


class ReencryptionEnd(_Body, frozen=True, forbid_unknown_fields=True):
    state: str
    rewritten: int
    failed: int


class Declare(_Body, frozen=True, forbid_unknown_fields=True):
    reason: str


class HealComplete(_Body, frozen=True, forbid_unknown_fields=True):
    attestation: str
    new_certificates: bool = False
    kek: str | None = None


class Rejoin(_Body, frozen=True, forbid_unknown_fields=True):
    patience_s: float = 30.0


class AdminAdd(_Body, frozen=True, forbid_unknown_fields=True):
    public_key_pem: str
    approval: str | None = None
    by: str = ""


class AdminRemove(_Body, frozen=True, forbid_unknown_fields=True):
    approval: str | None = None
    by: str = ""


class ApprovalRequest(_Body, frozen=True, forbid_unknown_fields=True):
    action: str
    subject: str
    payload: dict[str, Any]
    by: str = ""
    valid_s: int = 3600


class ApprovalSign(_Body, frozen=True, forbid_unknown_fields=True):
    admin: str
    signature: str


class BackupImport(_Body, frozen=True, forbid_unknown_fields=True):
    content_base64: str
    trial: bool = False


class Rotate(_Body, frozen=True, forbid_unknown_fields=True):
    service: str | None = None
    everything: bool = False
    use: str | None = None


class ServiceRemove(_Body, frozen=True, forbid_unknown_fields=True):
    proxy: str | None = None


class ProxyAdd(_Body, frozen=True, forbid_unknown_fields=True):
    url: str
    ca_pem: str


class EnvInit(_Body, frozen=True, forbid_unknown_fields=True):
    url: str
    region: str = ""
    geo: str = ""
    address: str = ""
    load_balancer_name: str = ""
    lease_s: int = 300


class EnvJoin(_Body, frozen=True, forbid_unknown_fields=True):
    url: str
    manager_url: str
    manager_agent: str
    fingerprint: str
    region: str = ""
    geo: str = ""
    address: str = ""
    load_balancer_name: str = ""


class Fingerprint(_Body, frozen=True, forbid_unknown_fields=True):
    fingerprint: str


class EnvRetire(Reason, frozen=True, forbid_unknown_fields=True):
    approval: str = ""


class Recovery(_Body, frozen=True, forbid_unknown_fields=True):
    old_kek: str | None = None
    lost: bool = False


class Promotion(_Body, frozen=True, forbid_unknown_fields=True):
    approval: str
    asked: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Route:
    operation: str
    method: str
    path: str
    body: type[_Body]
    summary: str
    changes: bool = True


_KEY: Final = "/v1/services/{service}/keys/{kid}"
_INCIDENT: Final = "/v1/incidents/{incident}"
ROUTES: Final = (
    Route("status", "GET", "/v1/status", Nothing, "Who holds what until when", changes=False),
    Route("kek_status", "GET", "/v1/kek", Nothing, "The KEK and a fresh look at it", changes=False),
    Route("service_list", "GET", "/v1/services", Nothing, "Network services and their keys", changes=False),
    Route("proxy_list", "GET", "/v1/proxies", Nothing, "Proxies and their services", changes=False),
    Route("diagnosis", "GET", "/v1/diagnosis", Nothing, "HSM, KEK, certificates and proxies, looked at now"),
    Route("restorable", "GET", "/v1/kek/restorable", Nothing, "What a restore would make readable"),
    Route("kek_create", "POST", "/v1/kek", NewKek, "Make the first KEK in the HSM, or adopt one"),
    Route("kek_rotate", "POST", "/v1/kek/rotate", NewKek, "Move every key to a new KEK"),
    Route("kek_revoke", "POST", "/v1/kek/revoke", Nothing, "Take every key back and destroy the KEK"),
    Route("reinstate", "POST", "/v1/kek/reinstate", Reinstate, "New KEK and keys, or the old KEK restored"),
    Route("service_add", "PUT", "/v1/services/{service}", ServiceAdd, "Provision a service at a proxy"),
    Route("service_remove", "POST", "/v1/services/{service}/remove", ServiceRemove, "Withdraw and erase"),
    Route("service_set", "PATCH", "/v1/services/{service}", ServiceSet, "Age at which its keys rotate"),
    Route("rotate", "POST", "/v1/rotations", Rotate, "The next key of a service, or of all, in two phases"),
    Route("rotate_cancel", "POST", "/v1/services/{service}/rotation/cancel", Nothing, "Give up a rotation"),
    Route("key_list", "GET", "/v1/services/{service}/keys", Nothing, "Keys, and who holds them"),
    Route("key_suspend", "POST", f"{_KEY}/suspend", Reason, "No use until it is resumed"),
    Route("key_resume", "POST", f"{_KEY}/resume", Nothing, "Undo a suspension"),
    Route("key_deactivate", "POST", f"{_KEY}/deactivate", Reason, "To open only"),
    Route("key_compromise", "POST", f"{_KEY}/compromise", Reason, "No use, for good"),
    Route("key_loss", "GET", f"{_KEY}/loss", Nothing, "What its destruction makes unreadable"),
    Route("key_destroy", "POST", f"{_KEY}/destroy", Destroy, "Erase it; its id stands in the body again"),
    Route("incident_open", "POST", "/v1/incidents", IncidentOpen, "A breach: what has to stop, stops"),
    Route("incident_list", "GET", "/v1/incidents", Nothing, "All of them", changes=False),
    Route("incident_status", "GET", _INCIDENT, Nothing, "Who has acknowledged it, asked now"),
    Route("incident_scope", "GET", f"{_INCIDENT}/scope", Nothing, "Every key, and how", changes=False),
    Route("incident_compromise", "POST", f"{_INCIDENT}/compromise", ApprovedKeys, "Further keys of it"),
    Route("incident_rekey", "POST", f"{_INCIDENT}/rekey", Rekey, "New keys for those that were taken away"),
    Route("incident_cancel", "POST", f"{_INCIDENT}/cancel", Approved, "A false alarm"),
    Route("incident_close", "POST", f"{_INCIDENT}/close", Nothing, "Nothing is left to do"),
    Route("incident_evidence", "POST", f"{_INCIDENT}/evidence", Nothing, "A file that proves itself"),
    Route(
        "reencryption_begin",
        "POST",
        f"{_INCIDENT}/reencryptions",
        ReencryptionBegin,
        "Which keys a re-encryption is about",
    ),
    Route(
        "reencryption_end",
        "POST",
        "/v1/reencryptions/{job}/end",
        ReencryptionEnd,
        "What became of a re-encryption",
    ),
    Route("reencryption_list", "GET", "/v1/reencryptions", Nothing, "Re-encryptions", changes=False),
    Route("keys_rescue", "POST", "/v1/keys/rescue", Rescue, "Compromised keys open again, for a time"),
    Route("keys_retire", "POST", "/v1/keys/retire", Retire, "The end of keys, in every environment"),
    Route("keys_resume", "POST", "/v1/keys/resume", ApprovedKeys, "Suspended keys are what they were"),
    Route("env_declare", "POST", "/v1/environments/own/declare", Declare, "This one is not to be trusted"),
    Route("env_new_kek", "POST", "/v1/environments/own/kek", NewKek, "A new KEK while it heals"),
    Route(
        "env_heal_complete",
        "POST",
        "/v1/environments/{environment}/heal-complete",
        HealComplete,
        "Its operator says that it is sound again",
    ),
    Route("env_rejoin", "POST", "/v1/environments/{environment}/rejoin", Rejoin, "Confirmed, proven, active"),
    Route("admin_list", "GET", "/v1/admins", Nothing, "Who may approve", changes=False),
    Route("admin_add", "PUT", "/v1/admins/{admin}", AdminAdd, "Make an administrator known"),
    Route("admin_remove", "POST", "/v1/admins/{admin}/remove", AdminRemove, "Their word counts no more"),
    Route("approval_request", "POST", "/v1/approvals", ApprovalRequest, "Ask two administrators"),
    Route("approval_list", "GET", "/v1/approvals", Nothing, "All of them", changes=False),
    Route("approval_show", "GET", "/v1/approvals/{approval}", Nothing, "One of them", changes=False),
    Route("approval_sign", "POST", "/v1/approvals/{approval}/signatures", ApprovalSign, "Add a signature"),
    Route("backup_export", "POST", "/v1/backup/export", Nothing, "The registry as a file for this HSM alone"),
    Route("backup_import", "POST", "/v1/backup/import", BackupImport, "Fill what is missing from a file"),
    Route("proxy_add", "PUT", "/v1/proxies/{proxy}", ProxyAdd, "Make a proxy known, or change it"),
    Route(
        "env_identity",
        "GET",
        "/v1/environments/own/identity",
        Nothing,
        "What others know it by",
        changes=False,
    ),
    Route(
        "env_list",
        "GET",
        "/v1/environments",
        Nothing,
        "Environments, and what is heard of them",
        changes=False,
    ),
    Route("env_status", "GET", "/v1/environments/{environment}", Nothing, "One of them", changes=False),
    Route("env_init", "POST", "/v1/environments", EnvInit, "This environment becomes the first of several"),
    Route("env_join", "POST", "/v1/environments/own/join", EnvJoin, "Ask to be added to a manager's"),
    Route("env_add", "POST", "/v1/environments/{environment}/add", Fingerprint, "Say yes to one that asks"),
    Route("env_drain", "POST", "/v1/environments/{environment}/drain", Reason, "No new work for it"),
    Route("env_undrain", "POST", "/v1/environments/{environment}/undrain", Nothing, "It rejoins"),
    Route(
        "env_retire",
        "POST",
        "/v1/environments/{environment}/retire",
        EnvRetire,
        "It is none of them any more",
    ),
    Route(
        "env_policy",
        "GET",
        "/v1/services/{service}/policy",
        Nothing,
        "Which environment's key seals",
        changes=False,
    ),
    Route("env_policy_set", "PUT", "/v1/services/{service}/policy", EncryptPolicy, "Choose which one seals"),
    Route("env_promotion", "GET", "/v1/environments/own/promotion", Nothing, "What is to be signed"),
    Route("env_promote", "POST", "/v1/environments/own/promote", Promotion, "This agent becomes the manager"),
    Route(
        "env_recovery",
        "POST",
        "/v1/environments/own/recovery",
        Recovery,
        "What is to be signed so that it comes back when none counts",
    ),
    Route(
        "env_new_registry_key",
        "POST",
        "/v1/environments/own/registry-key",
        Nothing,
        "Another registry key, used from the next start on",
    ),
    Route(
        "env_recover", "POST", "/v1/environments/own/recover", Promotion, "It is the first that comes back"
    ),
    Route("proxy_remove", "POST", "/v1/proxies/{proxy}/remove", Nothing, "Withdraw everything from a proxy"),
)
_BY_NAME: Final = {route.operation: route for route in ROUTES}
_STATUS: Final = {
    ExitCode.USAGE: 400,
    ExitCode.REFUSED: 409,
    ExitCode.UNAVAILABLE: 503,
    ExitCode.FAILED: 500,
}


def commands(operations: Operations) -> web.Application:
    """Everything, for the socket."""
    application = make_application(client_max_size_bytes=_MAX_COMMAND_BYTES)
    for route in ROUTES:
        application.router.add_route(route.method, route.path, _handler(operations, route))
    openapi_route(application, openapi())
    return application


def read_only(agent: Agent, operations: Operations) -> web.Application:
    """Health, metrics and status, for the loopback port."""
    application = make_application()
    health_routes(
        application, readyz=agent.reasons_not_ready, livez=agent.reasons_not_alive, registry=REGISTRY
    )
    # `kek_status` and `diagnosis` reach the HSM and the proxies: not for whoever can reach this port.
    application.router.add_get("/v1/status", _handler(operations, _BY_NAME["status"]))
    openapi_route(application, openapi())
    return application


def _handler(operations: Operations, route: Route) -> Callable[[web.Request], Any]:
    operation = getattr(operations, route.operation)

    async def handle(request: web.Request) -> web.Response:
        content = await request.read()
        try:
            body = msgspec.json.decode(content or b"{}", type=route.body)
        except msgspec.DecodeError as error:
            raise ProblemError(400, "bad-request", str(error), "See /openapi.json.") from None
        arguments = {**request.match_info, **msgspec.structs.asdict(body)}
        try:
            result = await operation(**arguments)
        except (SealgateError, CommandError) as error:
            return _problem(error)
        return web.json_response(result, headers={"Cache-Control": "no-store"})

    return handle


def _problem(error: Exception) -> web.Response:
    told = explain_agent(error)
    return problem_response(
        _STATUS[told.exit_code],
        told.code,
        told.cause,
        told.next_step,
        headers={"Sealgate-Exit-Code": str(int(told.exit_code))},
    )


def explain_agent(error: Exception) -> CommandError:
    """What to tell an administrator about *error*."""
    match error:
        case RefusedChangeError():
            return CommandError(str(error), error.next_step, ExitCode.REFUSED, code="refused")
        case KeySourceError():
            withdrawn = error.verdict.withdraws
            next_step = "`key-agent doctor` looks closer"
            if withdrawn:
                next_step = "`key-agent reinstate` after a revocation"
            elif error.verdict in (Verdict.DENIED, Verdict.THROTTLED):
                next_step = NEXT_STEPS[error.verdict]
            elif error.verdict is Verdict.AUTH_PIN:
                next_step = "write the right PIN into that file: until it changes no login is tried again"
            return CommandError(
                f"HSM: {error.verdict}: {error.detail}",
                next_step,
                ExitCode.REFUSED if withdrawn else ExitCode.UNAVAILABLE,
                code=str(error.verdict).replace("_", "-"),
            )
        case BackupError():
            return CommandError(
                str(error),
                "give a file that `key-agent backup export` wrote",
                ExitCode.REFUSED,
                code="backup",
            )
        case ApprovalError():
            return CommandError(str(error), error.next_step, ExitCode.REFUSED, code=f"approval-{error.code}")
        case PeerError():
            return CommandError(
                f"another environment: {error}",
                "`key-agent env list` shows which of them answer",
                ExitCode.UNAVAILABLE if error.is_silence else ExitCode.REFUSED,
                code=f"peer-{error.code.replace('_', '-')}",
            )
        case StaleTermError() | EpochGapError():
            return CommandError(str(error), error.next_step, ExitCode.REFUSED, code="stale-term")
        case RegistryTamperedError():
            return CommandError(str(error), error.next_step, ExitCode.UNAVAILABLE, code="registry-tampered")
        case StateLockedError():
            return CommandError(str(error), error.next_step, ExitCode.UNAVAILABLE, code="locked")
        case RegistryInUseError():
            return CommandError(str(error), error.next_step, ExitCode.UNAVAILABLE, code="registry-in-use")
        case RegistryError():
            return CommandError(
                str(error), "mend the database, then try again", ExitCode.UNAVAILABLE, code="registry"
            )
        case _:
            return explain(error, program=PROGRAM)


@asynccontextmanager
async def control_socket(operations: Operations, path: Path) -> AsyncIterator[None]:
    """Commands on a Unix socket at *path* while the block runs. The caller holds the state lock."""
    try:
        async with running(commands(operations), grace_s=_GRACE_S) as runner:
            _remove(path)  # of an agent that was killed: we hold the lock
            await web.UnixSite(runner, str(path)).start()
            os.chmod(path, 0o600)  # noqa: PTH101 - in a 0700 directory, so nobody came before
            yield
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def call(path: Path, operation: str, arguments: Mapping[str, object]) -> Json | None:
    """Have the agent behind the socket *path* do it; None if no agent listens there.

    CommandError is its refusal.
    """
    route = _BY_NAME[operation]
    in_path = set(re.findall(r"\{(\w+)\}", route.path))
    url = "http://key-agent" + route.path.format(**{name: _segment(str(arguments[name])) for name in in_path})
    body = {name: value for name, value in arguments.items() if name not in in_path}
    timeout = aiohttp.ClientTimeout(total=_SLOW_S)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)), timeout=timeout) as client,
            client.request(route.method, url, data=json.dumps(body).encode() if body else None) as response,
        ):
            content = await response.read()
            status, headers = response.status, response.headers
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, ConnectionRefusedError | FileNotFoundError):
            return None
        raise CommandError(
            f"{path}: {error.os_error.strerror}", "run the command as the agent's user", ExitCode.FAILED
        ) from None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise CommandError(
            f"the running agent did not answer: {type(error).__name__}",
            "`key-agent status`, then the same command again: it can be repeated",
            ExitCode.UNAVAILABLE,
        ) from None
    answer = json.loads(content)
    if status == 200:
        return dict(answer)
    raise CommandError(
        str(answer.get("detail", f"HTTP {status}")),
        str(answer.get("next_step", "see the agent's log")),
        ExitCode(int(headers.get("Sealgate-Exit-Code", "1"))),
        code=str(answer.get("code", "failed")),
    )


def _segment(text: str) -> str:
    """*text* as one path segment: `tenant/service` keeps its slash by another name."""
    return quote(text, safe="")


def openapi() -> Json:
    """The document of the API."""
    paths: dict[str, dict[str, object]] = {}
    schemas, components = msgspec.json.schema_components(
        [route.body for route in ROUTES], ref_template="#/components/schemas/{name}"
    )
    problem = {"description": "A problem document", "content": {"application/problem+json": {}}}
    for route, schema in zip(ROUTES, schemas, strict=True):
        described: dict[str, object] = {
            "operationId": route.operation,
            "summary": route.summary,
            "responses": {
                "200": {"description": "Done", "content": {"application/json": {}}},
                "default": problem,
            },
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"\{(\w+)\}", route.path)
            ],
        }
        if route.body is not Nothing:
            described["requestBody"] = {"content": {"application/json": {"schema": schema}}, "required": True}
        paths.setdefault(route.path, {})[route.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sealgate key agent", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }
