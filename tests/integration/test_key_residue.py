"""Promise 2, looked at from outside: where key material can be found, and when it has gone (hsm.md 9).

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
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final

import pytest

from envelope.derive import ekm_binding, object_key
from envelope.keys import KeyId
from tests.integration.whole_site import OWNER, Reference, Site, until, whole_site

INTERVAL_S: Final = 5
VALIDITY_S: Final = 10
PIECE_BYTES: Final = 1 << 24
TORN_BYTES: Final = 256
"""Pieces of a mapping overlap by so much: longer than any spelling."""


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with whole_site(tmp_path, names=("near",), interval_s=INTERVAL_S, validity_s=VALIDITY_S) as made:
        yield made


# --- what is searched ---


def spellings(secret: bytes) -> set[bytes]:
    """Text and bytes that tell *secret*, or half of it; as JSON in a JWS has it, too: encoded twice."""
    once = [
        secret,
        secret[:16],
        secret[16:],
        secret.hex().encode(),
        secret.hex().upper().encode(),
        *_in_base64(secret),
    ]
    written = base64.urlsafe_b64encode(secret).rstrip(b"=")
    return {*once, *_in_base64(written)}


def _in_base64(secret: bytes) -> Iterator[bytes]:
    """What base64 of a text with *secret* in it contains, wherever in the text it begins."""
    for lead in range(3):
        encoded = base64.b64encode(bytes(lead) + secret)
        # Without the characters that what stands before and behind has a part in.
        inner = encoded[(0, 2, 3)[lead] : (lead + len(secret)) * 8 // 6]
        yield inner
        yield inner.translate(bytes.maketrans(b"+/", b"-_"))


@dataclass(frozen=True, slots=True)
class Known:
    """One key of the service, as nobody but this test may know it."""

    needles: dict[str, set[bytes]] = field(repr=False)

    @classmethod
    def learn(cls, site: Site, kek: dict[str, str]) -> "Known":
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
        material = bytes.fromhex(opened)
        return cls({"KM": spellings(material), "object key": spellings(object_key(material, OWNER, key_id))})

    def seen_in(self, piece: bytes) -> set[str]:
        return {name for name, told in self.needles.items() if any(needle in piece for needle in told)}


def memory_of(pid: int) -> Iterator[bytes]:
    """Every writable mapping of the process, a piece at a time. It has ended: nothing."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        mappings = Path(f"/proc/{pid}/maps").read_text().splitlines()
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for line in mappings:
                if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) [r-]w", line):
                    yield from _pieces(memory, int(found[1], 16), int(found[2], 16))


def _pieces(memory: FileIO, at: int, stop: int) -> Iterator[bytes]:
    while at < stop:
        size = min(PIECE_BYTES, stop - at)
        try:
            memory.seek(at)
            yield memory.read(size)
        except (OSError, ValueError, OverflowError):
            return  # unmapped meanwhile, or one of the kernel's own
        at += size if at + size == stop else size - TORN_BYTES


def in_memory(pid: int, known: Known) -> set[str]:
    return set().union(*map(known.seen_in, memory_of(pid)))


def in_files(directory: Path, known: Known) -> dict[str, set[str]]:
    found = {}
    for path in directory.rglob("*"):
        if path.is_file() and (seen := known.seen_in(path.read_bytes())):
            found[str(path.relative_to(directory))] = seen
    return found


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def leaves_no_core(pid: int) -> bool:
    limits = Path(f"/proc/{pid}/limits").read_text()
    return re.search(r"Max core file size\s+0\s+0\s", limits) is not None


# --- when it has gone ---


@pytest.mark.timeout(240)
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
            known = await asyncio.to_thread(Known.learn, site, kek)
            assert in_memory(proxy.pid, known) == {"KM", "object key"}, "the scan finds what is there"
            return known

        async def has_gone(known: Known) -> None:
            async def not_there() -> bool:
                return not await asyncio.to_thread(in_memory, proxy.pid, known)

            await until(not_there, timeout_s=10)
            await nowhere_at_the_agent(known)

        async def nowhere_at_the_agent(known: Known) -> None:
            assert not in_memory(agent.pid, known), "the agent's own process never holds a key"
            # A batch may be under way: between two, nothing is there. Without consent there is no worker.
            for worker in children_of(agent.pid):

                async def wiped(worker: int = worker) -> bool:
                    return not in_memory(worker, known)

                await until(wiped, timeout_s=10)
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
