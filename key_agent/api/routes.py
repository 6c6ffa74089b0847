"""Which request is which operation: one table that the server, the client and `/openapi.json` read.

1. An operation is the method of `Operations` that has its name.
2. What changes anything is served on the socket alone; the loopback port shows the status (server.py).
"""

import re
from dataclasses import dataclass
from typing import Final

import msgspec

from key_agent.api.bodies import (
    AdminAdd,
    AdminRemove,
    ApprovalRequest,
    ApprovalSign,
    Approved,
    ApprovedKeys,
    BackupImport,
    Body,
    Declare,
    Destroy,
    EncryptPolicy,
    EnvInit,
    EnvJoin,
    EnvRetire,
    Fingerprint,
    HealComplete,
    IncidentOpen,
    Keys,
    NewKek,
    Nothing,
    Promotion,
    ProxyAdd,
    Reason,
    Recovery,
    ReencryptionBegin,
    ReencryptionEnd,
    Reinstate,
    Rejoin,
    Rekey,
    Rescue,
    Retire,
    Rotate,
    ServiceAdd,
    ServiceRemove,
    ServiceSet,
)
from key_agent.operations.commands import Json


@dataclass(frozen=True, slots=True)
class Route:
    operation: str
    method: str
    path: str
    body: type[Body]
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
    Route(
        "reencryption_drop",
        "POST",
        "/v1/reencryptions/{job}/drop",
        Nothing,
        "Its store is gone for good; what it knows stays known",
    ),
    Route("reencryption_list", "GET", "/v1/reencryptions", Nothing, "Re-encryptions", changes=False),
    Route("keys_rescue", "POST", "/v1/keys/rescue", Rescue, "Compromised keys open again, for a time"),
    Route("keys_loss", "POST", "/v1/keys/loss", Keys, "What the end of keys is known to lose"),
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
BY_NAME: Final = {route.operation: route for route in ROUTES}


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
