"""Shared rows of three environments, as small as they can be and as real: bodies of documents.py.

`World.change(...)` runs a change on a draft as the registry does, all or nothing; every body is written and
read back in its canonical form, so what could not be stored fails here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from envelope.keys import KeyId, KeyState, KeyUse
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import (
    AdminBody,
    AdminState,
    ApprovalBody,
    DekBody,
    EnvironmentBody,
    KekBody,
    Kind,
    RingBody,
    ServiceBody,
    body_text,
    read_body,
)
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.shared_view import Shared
from key_agent.environments.states import EnvironmentState

NOW_MS = 1_800_000_000_000
TENANT = "acme"
TABLES = {
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


def rows_of() -> Any:
    """A view whose tables can be changed by hand, which the type does not allow."""
    tables: dict[str, Any] = {name: {} for name in TABLES.values()}
    return Shared(term=1, epoch=1, **tables)


def next_rows(rows: Shared, *, epoch: int | None = None) -> Shared:
    """The same, one epoch later, with tables of its own."""
    tables: dict[str, Any] = {name: dict(getattr(rows, name)) for name in TABLES.values()}
    return dataclasses.replace(rows, epoch=rows.epoch + 1 if epoch is None else epoch, **tables)


class World:
    def __init__(self) -> None:
        self.rows = rows_of()
        self.now_ms = NOW_MS
        self.keys = {name: ed25519.Ed25519PrivateKey.generate() for name in ("ada", "bob")}
        for name, key in self.keys.items():
            pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
            self.rows.admins[name] = AdminBody(
                name=name,
                public_key=approvals.read_public_key(pem),
                state=AdminState.ACTIVE,
                added_at_ms=0,
                added_by="setup",
            )
        for name in "abc":
            self.rows.environments[name] = EnvironmentBody(
                name=name,
                agent_id=f"agent-{name}",
                api_url="https://localhost:1",
                kek_id=f"kek-{name}",
                state=EnvironmentState.ACTIVE,
                since_ms=0,
            )
            self.rows.keks[f"kek-{name}"] = self.kek(name, created_at_ms=0)
        self.rows.services["acme/s3"] = ServiceBody()
        self.rows.services["acme/box"] = ServiceBody()
        self.dek: dict[str, str] = {}
        """By `<service><environment>`: the active key."""
        for service in ("s3", "box"):
            ring = f"{service:0>32}"
            self.rows.rings[ring] = RingBody(service=f"acme/{service}", use=KeyUse.DATA)
            for version, name in enumerate("abc", start=1):
                self.dek[f"{service}-{name}"] = self.add_key(service, name, KeyState.ACTIVE, version)

    @staticmethod
    def kek(environment: str, *, created_at_ms: int, version: int = 1) -> KekBody:
        return KekBody(
            environment=environment,
            version=version,
            method="gcm",
            kek_type="aes-256",
            state="active",
            since_ms=created_at_ms,
            created_at_ms=created_at_ms,
        )

    def add_key(self, service: str, owner: str, state: KeyState, version: int = 9) -> str:
        key_id = str(KeyId.random())
        self.rows.deks[key_id] = DekBody(
            ring=f"{service:0>32}",
            service=f"acme/{service}",
            owner_environment=owner,
            generator_environment="a",
            use=KeyUse.DATA,
            version=version,
            kcv="00" * 16,
            state=state,
            since_ms=0,
            created_at_ms=0,
        )
        return key_id

    def states(self) -> dict[str, KeyState]:
        return {name: self.rows.deks[key_id].state for name, key_id in self.dek.items()}

    def change[T](self, work: Callable[[Draft], T]) -> T:
        """One transaction; what raises changes nothing, what puts nothing new makes no epoch."""
        draft = Draft(next_rows(self.rows, epoch=self.rows.epoch), tenant_id=TENANT, now_ms=self.now_ms)
        result = work(draft)
        for (kind, _), body in draft.changed.items():
            assert read_body(kind, body_text(body)) == body
        if draft.changed:
            self.rows = dataclasses.replace(draft.shared, epoch=draft.epoch)
        return result

    def approve(
        self,
        action: Action,
        subject: str,
        payload: dict[str, object],
        *,
        by: str = "ada bob",
        approval: str = "",
    ) -> str:
        """An approval of that, signed by *by*."""
        name = approval or f"a-{len(self.rows.approvals):016x}"
        text = approvals.payload_text(payload)
        body = ApprovalBody(
            action=action,
            subject=subject,
            payload=text,
            payload_sha256=approvals.payload_sha256(text),
            requested_by="ada",
            requested_at_ms=self.now_ms,
            expires_at_ms=self.now_ms + 1000,
            signatures={},
        )
        signed = approvals.statement(TENANT, name, body)
        signatures = {one: approvals.sign_statement(self.keys[one], signed) for one in by.split()}
        self.rows.approvals[name] = msgspec.structs.replace(body, signatures=signatures)
        return name
