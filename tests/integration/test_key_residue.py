"""Promise 2, looked at from outside: where key material can be found, and when it has gone.

1. The test knows a service's key: another process has the HSM open the registry's wrapped key.
2. Its bytes, and those of the object key derived from it, in the spellings that programs give them, are
   searched in the memory of agent, HSM worker and proxy, and in every file: registry, directory, audit logs,
   logs, configuration.
3. A scan that finds nothing proves something only if it finds what is there: while keys are valid, the
   proxy's memory holds them.
"""

import asyncio
import base64
import contextlib
import os
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from envelope.derive import ekm_binding
from envelope.keys import KeyId
from tests.integration.key_residue import Known, children_of, in_files, in_memory, spellings
from tests.integration.whole_site import OWNER, Reference, Site, until, whole_site

INTERVAL_S: Final = 5
VALIDITY_S: Final = 10


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with whole_site(tmp_path, names=("near",), interval_s=INTERVAL_S, validity_s=VALIDITY_S) as made:
        yield made


def learn(site: Site, kek: dict[str, str]) -> Known:
    """Open the active key's wrap in the HSM, by a process that runs no code of Sealgate's."""
    file = f"file:{site.registry_file}?mode=ro"
    with contextlib.closing(sqlite3.connect(file, uri=True)) as registry:
        [(kid, wrapped)] = registry.execute(
            "SELECT dek.id, wrapped FROM dek JOIN dek_wrap ON dek_id = dek.id "
            "WHERE dek.state = 'active' AND kek_id = ?",
            (kek["id"],),
        )
    key_id = KeyId.parse(kid)
    binding = ekm_binding(OWNER, key_id, kek_id=kek["id"], environment_id="main")
    opened = site.hsm.run(
        "unwrap-gcm",
        Reference(kek["label"], bytes.fromhex(kek["object_id"])),
        arguments={"wrapped": wrapped.hex(), "binding": binding.hex()},
    )
    return Known.of(bytes.fromhex(opened), OWNER, key_id)


def leaves_no_core(pid: int) -> bool:
    limits = Path(f"/proc/{pid}/limits").read_text()
    return re.search(r"Max core file size\s+0\s+0\s", limits) is not None


# --- when it has gone ---


async def test_key_material_is_nowhere_after_its_end(site: Site) -> None:
    (near,) = site.proxies
    plain = os.urandom(200_000)
    kek = (await site.command("kek", "status"))["kek"]
    async with site.proxy(near) as proxy, site.agent() as agent:

        async def uploaded() -> bool:
            return (await near.ask("/a", "-T", "-", body=plain)).status in {201, 204}

        async def refuses() -> bool:
            return not await near.serves("/a", plain)

        async def is_used() -> Known:
            """The key seals and opens; the scan finds it where it has to be, and only there."""
            await until(uploaded)
            assert await near.serves("/a", plain)
            known = await asyncio.to_thread(learn, site, kek)
            assert in_memory(proxy.pid, known) == {"KM", "object key"}, "the scan finds what is there"
            return known

        async def has_gone(known: Known) -> None:
            async def not_there() -> bool:
                return not await asyncio.to_thread(in_memory, proxy.pid, known)

            await until(not_there, timeout_s=30)
            await nowhere_at_the_agent(known)

        async def nowhere_at_the_agent(known: Known) -> None:
            assert not in_memory(agent.pid, known), "the agent's own process never holds a key"
            # A batch may be under way: between two, nothing is there. Without consent there is no worker.
            for worker in children_of(agent.pid):

                async def wiped(worker: int = worker) -> bool:
                    return not in_memory(worker, known)

                await until(wiped, timeout_s=30)
            assert not in_files(site.directory, known)

        first = await is_used()
        assert children_of(agent.pid), "the HSM's worker runs"
        await nowhere_at_the_agent(first)
        for pid in (agent.pid, proxy.pid, *children_of(agent.pid)):
            assert leaves_no_core(pid)

        # The validity ends: nobody could tell the proxy anything.
        await near.relay.cut()
        await until(refuses)
        assert (await near.ask("/a")).code == "key-expired"
        await has_gone(first)

        # It comes again, as often as the enterprise consents; and is taken back with its service.
        await near.relay.open()
        await until(uploaded)
        assert in_memory(proxy.pid, first) == {"KM", "object key"}
        await site.command("service", "remove", "files", "--yes")
        await until(refuses)
        await has_gone(first)

        # Revoked: destroyed in the HSM by someone else.
        await site.add_service(near)
        second = await is_used()
        await site.destroy_kek_by_another_process()
        await until(refuses)
        assert (await near.ask("/a")).code == "key-withdrawn"
        await has_gone(second)
        assert not in_memory(proxy.pid, first)
    for known in (first, second):
        assert not in_files(site.directory, known), "nor after both have ended"


def test_the_scan_knows_each_spelling(tmp_path: Path) -> None:
    secret = bytes(range(100, 132))
    known = Known({"KM": spellings(secret)})
    inner = base64.urlsafe_b64encode(secret).rstrip(b"=")
    for lead in range(4):
        for text in (secret, inner):
            around = b"x" * lead + text + b"yz"
            assert known.seen_in(base64.b64encode(around))
            assert known.seen_in(base64.urlsafe_b64encode(around))
    assert known.seen_in(b"..." + secret.hex().upper().encode())
    assert known.seen_in(secret[16:])
    assert not known.seen_in(bytes(range(256))[:110])
    (tmp_path / "log").write_text(f'{{"event": "{secret.hex()}"}}')
    assert in_files(tmp_path, known) == {"log": {"KM"}}
