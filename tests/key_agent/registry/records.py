"""KEKs, keys and services to fill a registry with."""

import os
from dataclasses import replace
from typing import Any

from envelope.keys import KeyId, NetworkService
from key_agent.registry.model import Proxy, Reservation
from key_agent.registry.store import Registry
from key_agent.sources.source import Kek, KekReference, WrapMethod, WrappedKey

NOW_MS = 1_800_000_000_000
S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")


async def open_registry(url: str, **changes: Any) -> Registry:
    names = {"tenant_id": "acme", "environment_id": "main", "agent_id": "hq"} | changes
    return await Registry.open(url, now_ms=NOW_MS, **names)


def reference_of(kek_id: str = "k1") -> KekReference:
    return KekReference(
        kek_id=kek_id, label=f"sealgate-{kek_id}", object_id=kek_id.encode(), environment_id="main"
    )


def kek_of(kek_id: str = "k1") -> Kek:
    return Kek(
        reference=reference_of(kek_id),
        method=WrapMethod.GCM,
        token_serial="serial",
        canary_ciphertext=b"canary",
        canary_sha256=b"sha",
        created_at_ms=NOW_MS,
    )


def key_of(owner: NetworkService = S3, kek_id: str = "k1", **changes: Any) -> WrappedKey:
    key = WrappedKey(
        owner=owner,
        key_id=KeyId.random(),
        kek_id=kek_id,
        environment_id="main",
        method=WrapMethod.GCM,
        wrapped=os.urandom(60),
        kcv=os.urandom(16),
        token_serial="serial",
        created_at_ms=NOW_MS,
    )
    return replace(key, **changes)


def under(key: WrappedKey, kek_id: str) -> WrappedKey:
    """The same key under another KEK."""
    return replace(key, kek_id=kek_id, wrapped=os.urandom(60))


async def add_kek(registry: Registry, kek_id: str = "k1", *keys: WrappedKey) -> None:
    await registry.begin_kek(reference_of(kek_id), now_ms=NOW_MS)
    await registry.complete_kek(kek_of(kek_id), keys, now_ms=NOW_MS)


async def add_service(
    registry: Registry, owner: NetworkService, *proxies: str, key: WrappedKey | None = None
) -> WrappedKey:
    """*owner* at *proxies* (default p1), with its first key."""
    if await registry.current_kek() is None:
        await add_kek(registry)
    key = key or key_of(owner)
    for number, name in enumerate(proxies or ("p1",)):
        await registry.add_proxy(Proxy(id=name, url="https://p.example", ca_pem="CA"), now_ms=NOW_MS)
        await registry.add_service(
            owner, proxy_id=name, certificate_pem="PEM", key=None if number else key, now_ms=NOW_MS
        )
    return key


async def with_services(registry: Registry, *owners: NetworkService, proxy: str = "p1") -> list[WrappedKey]:
    """*owners* at one more proxy; the keys that had to be made for that."""
    if await registry.current_kek() is None:
        await add_kek(registry)
    await registry.add_proxy(Proxy(id=proxy, url="https://p.example", ca_pem="CA"), now_ms=NOW_MS)
    keys = []
    for owner in owners:
        key = None if await registry.has_active_key(owner) else key_of(owner)
        await registry.add_service(owner, proxy_id=proxy, certificate_pem="PEM", key=key, now_ms=NOW_MS)
        keys += [key] if key else []
    return keys


async def reserve(
    registry: Registry, *owners: NetworkService, proxies: tuple[str, ...] = ("p1",), now_ms: int = NOW_MS
) -> tuple[Kek, list[Reservation]]:
    """As for a push whose keys are valid for 330 s."""
    return await registry.reserve(owners, proxies, now_ms=now_ms, until_ms=now_ms + 330_000)
