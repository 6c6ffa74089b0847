"""Shared registries of agents that never meet: deltas are carried by the test.

async with registry_of(tmp_path, "a", url) as a, registry_of(tmp_path, "b") as b:
    b.shared.pin("agent-a", a.public)
    await a.write(a.first_rows())
    await b.shared.apply(await a.shared.since(0), now_ms=NOW_MS)
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import text

from envelope.base64url import b64u_encode
from envelope.keys import KeyState, KeyUse
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import (
    AdminBody,
    AdminState,
    ApprovalBody,
    Body,
    DekBody,
    Delta,
    EnvironmentBody,
    Kind,
    RingBody,
    ServiceBody,
    TenantBody,
    TermBody,
)
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.mark import NAME as MARK_NAME
from key_agent.environments.shared.registry_key import public_text, read_or_make_registry_key
from key_agent.environments.shared.shared import SharedRegistry
from key_agent.environments.shared.shared_view import Shared
from key_agent.environments.shared.terms import promotion_payload
from key_agent.environments.states import EnvironmentState
from key_agent.registry.store import Registry

NOW_MS: Final = 1_800_000_000_000
TENANT: Final = "acme"
SERVICE: Final = "acme/files"
RING: Final = "ab" * 16
KID: Final = "11" * 16
NEXT_KID: Final = "22" * 16


class Admins:
    """Administrators, and what they sign."""

    def __init__(self, *names: str) -> None:
        self.keys = {name: Ed25519PrivateKey.generate() for name in names}

    def rows(self) -> list[tuple[Kind, str, Body]]:
        return [
            (
                Kind.ADMIN,
                name,
                AdminBody(
                    name=name,
                    public_key=b64u_encode(
                        key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
                    ),
                    state=AdminState.ACTIVE,
                    added_at_ms=NOW_MS,
                    added_by="test",
                ),
            )
            for name, key in self.keys.items()
        ]

    def promotion(
        self, holder: "Holder", view: Shared, *, by: str = "ann bob", at_ms: int = NOW_MS
    ) -> tuple[str, ApprovalBody]:
        payload = promotion_payload(
            agent=f"agent-{holder.name}",
            environment=holder.name,
            registry_key=holder.public,
            term=view.term,
            epoch=view.epoch,
            digest=view.digest,
        )
        return self.approval(Action.ENVIRONMENT_PROMOTE, holder.name, payload, by=by, at_ms=at_ms)

    def approval(
        self,
        action: Action,
        subject: str,
        payload: dict[str, object],
        *,
        by: str = "ann bob",
        at_ms: int = NOW_MS,
    ) -> tuple[str, ApprovalBody]:
        text = approvals.payload_text(payload)
        approval = f"a-{approvals.payload_sha256(f'{text}{at_ms}')[:16]}"
        asked = ApprovalBody(
            action=action,
            subject=subject,
            payload=text,
            payload_sha256=approvals.payload_sha256(text),
            requested_by="test",
            requested_at_ms=at_ms,
            expires_at_ms=at_ms + 3_600_000,
            signatures={},
        )
        signed = approvals.statement(TENANT, approval, asked)
        signatures = {name: approvals.sign_statement(self.keys[name], signed) for name in by.split()}
        return approval, msgspec.structs.replace(asked, signatures=signatures)


ADMINS: Final = Admins("ann", "bob")


class Holder:
    """One environment's shared registry."""

    def __init__(self, name: str, registry: Registry, shared: SharedRegistry, directory: Path) -> None:
        self.name = name
        self.registry = registry
        self.shared = shared
        self.directory = directory
        self.key = read_or_make_registry_key(directory)
        self.public = public_text(self.key)

    @property
    def mark(self) -> Path:
        return self.directory / MARK_NAME

    async def write(
        self, *rows: tuple[Kind, str, Body], term: int = 1, also: Callable[[Any], object] | None = None
    ) -> Delta:
        """As the manager."""

        def change(draft: Draft) -> None:
            for kind, row_id, body in rows:
                draft.put(kind, row_id, body)

        return await self.shared.write(change, term=term, now_ms=NOW_MS, also=also)

    async def promote(self, admins: "Admins", term: int | None = None, *, by: str = "ann bob") -> Delta:
        """This one begins the next term, as these administrators have signed."""
        view = await self.shared.snapshot()
        approval, asked = admins.promotion(self, view, by=by)
        return await self.shared.begin_term(
            term or view.term + 1, cause="test", now_ms=NOW_MS, approval=(approval, asked)
        )

    async def take(self, delta: Delta) -> Shared:
        await self.shared.apply(delta, now_ms=NOW_MS)
        return await self.shared.snapshot()

    async def sql(self, statement: str, **values: object) -> list[Any]:
        def work(c: Any) -> list[Any]:
            found = c.execute(text(statement), values)
            return list(found) if found.returns_rows else []

        return await self.registry.transact(work)

    def first_rows(self) -> tuple[tuple[Kind, str, Body], ...]:
        return (
            (Kind.TENANT, TENANT, TenantBody(home_environment=self.name)),
            (
                Kind.TERM,
                f"{1:020d}",
                TermBody(
                    agent=f"agent-{self.name}",
                    environment=self.name,
                    registry_key=self.public,
                    since_ms=NOW_MS,
                    cause="test",
                ),
            ),
            (Kind.ENVIRONMENT, self.name, self.environment()),
            *ADMINS.rows(),
            (Kind.SERVICE, SERVICE, ServiceBody()),
            (Kind.RING, RING, RingBody(service=SERVICE, use=KeyUse.DATA)),
            (Kind.DEK, KID, key(self.name)),
        )

    def environment(self, **changes: object) -> EnvironmentBody:
        body = EnvironmentBody(
            name=self.name,
            agent_id=f"agent-{self.name}",
            api_url="https://localhost:1",
            kms_type="gcm",
            registry_key=self.public,
            state=EnvironmentState.ACTIVE,
            since_ms=NOW_MS,
        )
        return msgspec.structs.replace(body, **changes)


def key(owner: str, state: KeyState = KeyState.ACTIVE, version: int = 1, **changes: object) -> DekBody:
    body = DekBody(
        ring=RING,
        service=SERVICE,
        owner_environment=owner,
        generator_environment=owner,
        use=KeyUse.DATA,
        version=version,
        kcv="5a" * 16,
        state=state,
        since_ms=NOW_MS,
        created_at_ms=NOW_MS,
    )
    return msgspec.structs.replace(body, **changes)


@asynccontextmanager
async def registry_of(directory: Path, name: str, url: str | None = None) -> AsyncIterator[Holder]:
    """Opened again, it is what it was."""
    place = directory / name
    place.mkdir(mode=0o700, exist_ok=True)
    registry = await Registry.open(
        url or f"sqlite:///{place / 'registry.db'}",
        tenant_id=TENANT,
        environment_id=name,
        agent_id=f"agent-{name}",
        now_ms=NOW_MS,
    )
    try:
        key_file = read_or_make_registry_key(place)
        shared = await SharedRegistry.open(registry, key=key_file, state_dir=place)
        yield Holder(name, registry, shared, place)
    finally:
        await registry.close()
