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
from sqlalchemy import text

from envelope.keys import KeyState, KeyUse
from key_agent.environments.documents import (
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
from key_agent.environments.mark import NAME as MARK_NAME
from key_agent.environments.registry_key import public_text, read_or_make_registry_key
from key_agent.environments.shared import Draft, Shared, SharedRegistry
from key_agent.environments.states import EnvironmentState
from key_agent.registry.store import Registry

NOW_MS: Final = 1_800_000_000_000
TENANT: Final = "acme"
SERVICE: Final = "acme/files"
RING: Final = "ab" * 16
KID: Final = "11" * 16
NEXT_KID: Final = "22" * 16


class Holder:
    """One environment's shared registry."""

    def __init__(self, name: str, registry: Registry, shared: SharedRegistry, directory: Path) -> None:
        self.name = name
        self.registry = registry
        self.shared = shared
        self.directory = directory
        self.public = public_text(read_or_make_registry_key(directory))

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
                TermBody(agent=f"agent-{self.name}", environment=self.name, since_ms=NOW_MS, cause="test"),
            ),
            (Kind.ENVIRONMENT, self.name, self.environment()),
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
