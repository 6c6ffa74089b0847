"""Another registry key for an environment whose own may be in other hands.

1. `env new-registry-key` makes it, in a file beside the one that is used. At the agent's next start, before
   anything is read, what this agent has signed for itself (mark and seal) is signed anew, and the new file
   takes the place of the old one.
2. Each of both is taken under either key meanwhile, so killed at any point the next start goes on. What is
   under neither was tampered with: nothing is exchanged, and the agent finds that out as ever.
3. Nobody else believes the new key by this. Two administrators have to name it (recovery.py).
"""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from key_agent.environments.shared.mark import Mark, MarkError, read_mark, write_mark
from key_agent.environments.shared.registry_key import (
    NAME,
    public_text,
    read_or_make_registry_key,
    read_registry_key_file,
)
from key_agent.environments.shared.shared_errors import RegistryTamperedError
from key_agent.environments.shared.shared_tables import check_seal, reseal
from key_agent.registry.store import Registry
from runtime.files import sync_directory

log = structlog.get_logger(__name__)

NEXT_NAME: Final = "registry.key.next"


def make_next_key(state_dir: Path) -> str:
    """The key that is used from the next start on, made if there is none; its public half, base64url.

    OSError, SettingsError.
    """
    return public_text(read_or_make_registry_key(state_dir, name=NEXT_NAME))


async def finish_exchange(registry: Registry, state_dir: Path) -> bool:
    """Rule 1, at the start; whether another key is used now. OSError, SettingsError, RegistryError."""
    path = state_dir / NEXT_NAME
    if not await asyncio.to_thread(os.path.lexists, path):
        return False
    old = await asyncio.to_thread(read_or_make_registry_key, state_dir)
    new = await asyncio.to_thread(read_registry_key_file, path)
    try:
        mark = await asyncio.to_thread(_mark_under, (old, new), state_dir, registry)
        await registry.transact(lambda c: check_seal(c, (old, new), registry.tenant_id))
    except (MarkError, RegistryTamperedError) as error:
        log.error("the registry key is not exchanged", cause=str(error))  # noqa: TRY400 - rule 2
        return False
    if mark is not None:
        await asyncio.to_thread(write_mark, state_dir, new, mark)
    await registry.transact(lambda c: reseal(c, new, registry.tenant_id))
    await asyncio.to_thread(_take_its_place, state_dir)
    log.warning("another registry key is used from now on")
    return True


def _mark_under(keys: tuple[Ed25519PrivateKey, ...], state_dir: Path, registry: Registry) -> Mark | None:
    """MarkError: there is one, under none of *keys*."""
    tenant, environment = registry.tenant_id, registry.environment_id
    *others, last = keys
    for key in others:
        with contextlib.suppress(MarkError):
            return read_mark(state_dir, key, tenant=tenant, environment=environment)
    return read_mark(state_dir, last, tenant=tenant, environment=environment)


def _take_its_place(state_dir: Path) -> None:
    (state_dir / NEXT_NAME).replace(state_dir / NAME)
    sync_directory(state_dir)
