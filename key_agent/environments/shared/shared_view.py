"""All shared rows at one epoch, as everything else in the agent reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from key_agent.environments.shared.documents import (
    AdminBody,
    ApprovalBody,
    Body,
    DekBody,
    EnvironmentBody,
    IncidentBody,
    IncidentKeyBody,
    KekBody,
    Kind,
    RingBody,
    ServiceBody,
    TenantBody,
    TermBody,
)

type Key = tuple[Kind, str]
"""Kind and id of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """All shared rows at one epoch."""

    term: int = 0
    epoch: int = 0
    digest: str = ""
    tenant: TenantBody | None = None
    terms: Mapping[str, TermBody] = field(default_factory=dict)
    environments: Mapping[str, EnvironmentBody] = field(default_factory=dict)
    keks: Mapping[str, KekBody] = field(default_factory=dict)
    services: Mapping[str, ServiceBody] = field(default_factory=dict)
    rings: Mapping[str, RingBody] = field(default_factory=dict)
    deks: Mapping[str, DekBody] = field(default_factory=dict)
    incidents: Mapping[str, IncidentBody] = field(default_factory=dict)
    incident_keys: Mapping[str, IncidentKeyBody] = field(default_factory=dict)
    admins: Mapping[str, AdminBody] = field(default_factory=dict)
    approvals: Mapping[str, ApprovalBody] = field(default_factory=dict)
    head: str = ""
    """The signature of the newest term's holder under term, epoch and digest."""


FIELDS: Final[Mapping[Kind, str]] = {
    Kind.TERM: "terms",
    Kind.ENVIRONMENT: "environments",
    Kind.KEK: "keks",
    Kind.SERVICE: "services",
    Kind.RING: "rings",
    Kind.DEK: "deks",
    Kind.INCIDENT: "incidents",
    Kind.INCIDENT_KEY: "incident_keys",
    Kind.ADMIN: "admins",
    Kind.APPROVAL: "approvals",
}
"""Where the rows of a kind stand. The tenant's is one."""


def changed(shared: Shared, **changes: Any) -> Shared:
    """*shared*, but for *changes*."""
    fields = {name: getattr(shared, name) for name in Shared.__dataclass_fields__}
    return Shared(**(fields | changes))


def view_of(bodies: Mapping[Key, Body], *, term: int, epoch: int, digest: str, tenant_id: str) -> Shared:
    """*bodies* at that epoch; its head is not signed yet."""
    kinds: dict[str, dict[str, Body]] = {name: {} for name in FIELDS.values()}
    tenant: Body | None = None
    for (kind, row_id), body in bodies.items():
        if kind is not Kind.TENANT:
            kinds[FIELDS[kind]][row_id] = body
        elif row_id == tenant_id:
            tenant = body
    fields: dict[str, Any] = {"term": term, "epoch": epoch, "digest": digest, "tenant": tenant, **kinds}
    return Shared(**fields)


def newest_term(shared: Shared) -> tuple[int, TermBody] | None:
    """The newest term and who holds it."""
    if not shared.terms:
        return None
    row_id = max(shared.terms)
    return int(row_id), shared.terms[row_id]
