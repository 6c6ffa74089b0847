"""B-01, 04, 06, 13, 14, 15, 18, 20, 21, 25, 26, 40: keys and what callers have of them, in three real
environments with an AES, an RSA and an EC KEK, a proxy each.

1. One site for all of them, in the order of this file. Between two tests all environments are active; the
   last one (B-14) leaves the first of them healing.
2. What an HSM was asked is counted at its PKCS#11 library, by OpenSC's spy (hsm_calls.py).
3. What is fast in the reference is measured by the bench (`breach_key_set`): here it has to happen.
"""

import asyncio
import base64
import contextlib
import functools
import os
import re
import signal
import sqlite3
import time
import warnings
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import pytest_asyncio
from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import KeySet

from envelope.derive import ekm_binding
from envelope.keys import KeyId, NetworkService
from envelope.objects import Sealer
from tests.environments.administrators import Commands
from tests.environments.fault_proxy import Fault
from tests.environments.site import (
    TENANT,
    EnvironmentsSite,
    SiteEnvironment,
    SiteProxy,
    environments_site,
    until,
)
from tests.integration.key_residue import Known, children_of, in_memory, spellings
from tests.integration.whole_site import Reference
from tests.scenarios.hsm_calls import OPENING, WRAPPING, HsmCalls

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: Final = "aGVsbG8="
AAD: Final = "aW52b2ljZSA3"
RHYTHM: Final = (30, 90, 0.3)
SHORT_VALIDITY: Final = (5, 12)
"""Refresh interval and validity, in seconds, where a test waits for the end of keys."""
SIGNERS: Final = {"signer": "ES256", "signer-rsa": "RS256", "signer-ed": "EdDSA"}
SERVICES: Final = ("files", *SIGNERS)


@dataclass(frozen=True, slots=True)
class World:
    site: EnvironmentsSite
    calls: dict[str, HsmCalls]
    called_before: dict[str, Any]
    """What each HSM had been asked when there was no key yet but the KEK."""
    ask: Commands

    @property
    def three(self) -> list[SiteEnvironment]:
        return list(self.site.environments.values())


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="world")
async def world_fixture(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = tmp_path_factory.mktemp("b")
    async with environments_site(directory, proxies_each=1, rhythm=RHYTHM, named=True) as site:
        calls = {name: HsmCalls(one) for name, one in site.environments.items()}
        async with site.agents(), site.proxies():
            await site.unite()
            before = {name: one.counted() for name, one in calls.items()}
            await site.add_service("files")
            for name, algorithm in SIGNERS.items():
                await site.add_service(name, use="sign", algorithm=algorithm)
            world = World(site, calls, before, Commands(set()))
            await all_serve(world)
            yield world


# --- calls ---


async def call(at: SiteEnvironment, operation: str, **body: object) -> tuple[int, dict[str, Any]]:
    return await at.proxies[0].call(operation, body)


async def encrypt(at: SiteEnvironment, **more: object) -> dict[str, Any]:
    """As a caller who comes again when told so (503): an agent that has just started takes back its word."""
    found: list[dict[str, Any]] = []

    async def answered() -> bool:
        status, document = await call(at, "encrypt", key="files", plaintext=HELLO, **more)
        assert status in {200, 503}, document
        found.append(document)
        return status == 200

    await until(answered)
    return found[-1]


async def decrypt(at: SiteEnvironment, ciphertext: str, **more: object) -> int:
    """The status; what is opened is what was sealed."""
    status, document = await call(at, "decrypt", ciphertext=ciphertext, **more)
    assert status != 200 or document["plaintext"] == HELLO
    return status


async def is_decrypted(at: SiteEnvironment, ciphertext: str, status: int, **more: object) -> bool:
    return await decrypt(at, ciphertext, **more) == status


async def get(at: SiteEnvironment, path: str) -> dict[str, Any]:
    proxy = at.proxies[0]
    async with (
        aiohttp.ClientSession() as session,
        session.get(
            f"http://127.0.0.1:{proxy.service_port}{path}", headers={"Authorization": f"Bearer {proxy.token}"}
        ) as answer,
    ):
        return dict(await answer.json(content_type=None))


async def key_set(at: SiteEnvironment) -> list[dict[str, str]]:
    """What verifiers get from this environment; nothing while it gives none."""
    found: list[dict[str, str]] = (await get(at, "/.well-known/jwks.json")).get("keys", [])
    return sorted(found, key=lambda key: key["kid"])


async def lacks(at: SiteEnvironment, key_id: str) -> bool:
    found = {key["kid"] for key in await key_set(at)}
    return bool(found) and key_id not in found


async def token_of(at: SiteEnvironment, subject: str, *, key: str = "signer") -> dict[str, Any]:
    status, document = await call(at, "token", key=key, subject=subject, audience="shop")
    assert status == 200, document
    return document


async def verifies(at: SiteEnvironment, token: str, *, key: str = "signer") -> int:
    return (await call(at, "token/verify", key=key, token=token, audience="shop"))[0]


async def owners(at: SiteEnvironment, service: str) -> dict[str, str]:
    """Key id -> the environment that owns it, of the active keys."""
    [ring] = (await at.ask("env_policy", service=service))["rings"]
    return {one["key"]: one["environment"] for one in ring["keys"] if one["owner"] == one["environment"]}


async def has_keys(at: SiteEnvironment, service: str) -> bool:
    """Whether this environment's proxy has a key of each, one of them active."""
    document = await get(at, f"/sealgate/v1/keys/{service}")
    states = [version["state"] for version in document.get("versions", [])]
    return sorted(states) == ["active", "deactivated", "deactivated"]


async def seals(at: SiteEnvironment) -> bool:
    return (await call(at, "encrypt", key="files", plaintext=HELLO))[0] == 200


async def serves(at: SiteEnvironment) -> bool:
    """Its agent, which may just have been started, says so, and its proxy has heard it."""
    return bool((await at.ask("env_list"))["serves"] == "serves" and await seals(at))


async def seals_with(at: SiteEnvironment, key_id: str) -> bool:
    status, document = await call(at, "encrypt", key="files", plaintext=HELLO)
    return status == 200 and document["key_id"] == key_id


async def takes_calls(proxy: SiteProxy) -> bool:
    """Its encryption service listens; it lives before it does."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.service_port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def has_ended(pid: int) -> bool:
    """It runs no more; its parent may not have heard of it."""
    return state_of(pid) == "Z"


def state_of(pid: int) -> str:
    """A letter, as in proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def start(*proxies: SiteProxy) -> None:
    await asyncio.gather(*(proxy.program.start() for proxy in proxies))
    for proxy in proxies:
        await until(functools.partial(takes_calls, proxy))


async def all_serve(world: World) -> None:
    for one in world.three:
        await until(functools.partial(takes_calls, one.proxies[0]))
        for service in SERVICES:
            await until(functools.partial(has_keys, one, service), timeout_s=90)
        # Its agent may have pushed keys before it said that they may be used.
        await until(functools.partial(serves, one), timeout_s=90)


# --- keys ---


async def test_b_01_each_kek_was_made_in_its_hsm_and_leaves_it_by_no_way(world: World) -> None:
    for one in world.three:
        kek = (await one.ask("kek_status"))["kek"]
        where = {"label": kek["label"], "id": kek["object_id"]}
        if one.kek_type != "aes-256":
            where["class"] = "PRIVATE_KEY"
        origin = await asyncio.to_thread(one.hsm.run, "origin", arguments=where)
        assert origin == {"LOCAL": True, "ALWAYS_SENSITIVE": True, "NEVER_EXTRACTABLE": True}, one.name
        assert await asyncio.to_thread(one.hsm.run, "export", arguments=where) == {
            "read": "AttributeSensitive",
            "wrap": "KeyUnextractable",
            "make extractable": "AttributeReadOnly",
            "make readable": "AttributeReadOnly",
            "copy extractable": "AttributeReadOnly",
            "copy readable": "AttributeReadOnly",
        }, one.name


async def test_b_04_asymmetric_keks_wrap_nothing(world: World) -> None:
    """Twelve keys stand under each KEK; the HSMs of b and c were asked to open them, and for nothing else."""
    asked = {name: one.counted() - world.called_before[name] for name, one in world.calls.items()}
    for name, counted in asked.items():
        one = world.site[name]
        with contextlib.closing(
            sqlite3.connect(f"file:{one.state_dir / 'registry.db'}?mode=ro", uri=True, timeout=20)
        ) as registry:
            wraps = registry.execute("SELECT route, state, count(*) FROM dek_wrap GROUP BY 1, 2").fetchall()
        assert wraps == [("kms" if name == "a" else "public", "verified", 12)]
        assert sum(counted[function] for function in OPENING) >= 12, (name, counted)
        wrapped = sum(counted[function] for function in WRAPPING)
        assert wrapped > 0 if name == "a" else wrapped == 0, (name, counted)
    # R3: all of them were made by one environment's HSM.
    assert asked["a"]["C_GenerateRandom"] > 0
    assert {asked[name]["C_GenerateRandom"] for name in "bc"} == {0}


async def test_b_06_signed_in_one_and_verified_in_all(world: World) -> None:
    sets = [await key_set(one) for one in world.three]
    assert sets[0] == sets[1] == sets[2]
    assert sorted(key["alg"] for key in sets[0]) == sorted(3 * [*SIGNERS.values()])
    message = base64.b64encode(b"invoice 7").decode()
    for service, algorithm in SIGNERS.items():
        for at in world.three:
            status, signed = await call(at, f"keys/{service}/sign", message=message)
            assert status == 200, signed
            proof = {"signature": signed["signature"], "version": signed["version"]}
            token = await token_of(at, "ann", key=service)
            for other, keys in zip(world.three, sets, strict=True):
                answer = await call(other, f"keys/{service}/verify", message=message, **proof)
                assert (answer[0], answer[1]["valid"]) == (200, True), (service, at.name, other.name)
                changed = base64.b64encode(b"invoice 8").decode()
                answer = await call(other, f"keys/{service}/verify", message=changed, **proof)
                assert (answer[0], answer[1]["valid"]) == (200, False)
                assert await verifies(other, token["token"], key=service) == 200
                # And by what others verify with, who know nothing of Sealgate.
                assert subject_by(keys, token["token"], algorithm) == "ann"


def subject_by(keys: Iterable[dict[str, str]], token: str, algorithm: str) -> str:
    """What an independent library reads from a token that it believes by the key set."""
    known: Any = {"keys": list(keys)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)  # "EdDSA" has another name since RFC 9864
        return str(jwt.decode(token, KeySet.import_key_set(known), algorithms=[algorithm]).claims["sub"])


async def test_b_13_15_18_20_what_one_environment_made_counts_in_all(world: World) -> None:
    a = world.three[0]
    of_files = await owners(a, "files")
    assert sorted(of_files.values()) == ["a", "b", "c"]
    held, tokens = [], []
    for one in world.three:
        named, anonymous = await encrypt(one, aad=AAD), await encrypt(one, aad=AAD, anonymous=True)
        assert [of_files[document["key_id"]] for document in (named, anonymous)] == [one.name] * 2, "B-13"
        held += [named, anonymous]
        tokens.append((await token_of(one, "ann"))["token"])
    nobodys = base64.b64encode(sealed_by_nobody()).decode()
    for one in world.three:
        for document in held:
            # B-15: by the id in the ciphertext or of the request, by the ring (C5), by neither (C6).
            ways: list[dict[str, str]] = [{}, {"ring": "files"}, {"key_id": document["key_id"]}]
            for way in ways:
                assert await decrypt(one, document["ciphertext"], aad=AAD, **way) == 200
            # B-18: another caller's name for it, a changed byte; 423 follows below (B-40).
            assert await decrypt(one, document["ciphertext"]) == 422
            assert await decrypt(one, changed_at_its_end(document["ciphertext"]), aad=AAD) == 422
        assert await decrypt(one, nobodys) == 404
        for token in tokens:
            assert await verifies(one, token) == 200, "B-20"


def sealed_by_nobody() -> bytes:
    """An object of a key that is in no environment."""
    sealer = Sealer(os.urandom(32), NetworkService(TENANT, "files"), KeyId.random())
    return bytes(sealer.update(b"hello")) + sealer.finalize()


def changed_at_its_end(ciphertext: str) -> str:
    raw = bytearray(base64.b64decode(ciphertext))
    raw[-1] ^= 1
    return base64.b64encode(raw).decode()


async def test_b_13_which_key_seals_is_a_policy(world: World) -> None:
    a, b, c = world.three
    keys = {owner: key_id for key_id, owner in (await owners(a, "files")).items()}
    steps = (
        (["pinned", "--key", keys["c"]], "ccc"),
        (["origin"], "aaa"),
        (["origin", "--home", "b"], "bbb"),
        (["own"], "abc"),
    )
    for words, wanted in steps:
        shown = await world.ask(a, "env policy", "files", *words)
        assert shown["spread"] == {"b": True, "c": True}
        for one, owner in zip(world.three, wanted, strict=True):
            await until(functools.partial(seals_with, one, keys[owner]))
    assert (await world.ask(c, "env policy", "files"))["policy"] == "own"
    refused = await world.ask(b, "env policy", "files", "own", exit_code=3)
    assert "manager" in refused["cause"]


# --- proxies that stop, and everything that stops ---


def materials(world: World, key_ids: Iterable[str]) -> Known:
    """The key material of these keys of `files`, whoever owns them: opened in a's HSM by another process."""
    one = world.site["a"]
    needles = {}
    with contextlib.closing(
        sqlite3.connect(f"file:{one.state_dir / 'registry.db'}?mode=ro", uri=True, timeout=20)
    ) as registry:
        [(kek_id, label, object_id)] = registry.execute(
            "SELECT id, label, object_id FROM kek WHERE state = 'active'"
        )
        for key_id in key_ids:
            [(wrapped,)] = registry.execute(
                "SELECT wrapped FROM dek_wrap WHERE dek_id = ? AND kek_id = ?", (key_id, kek_id)
            )
            binding = ekm_binding(
                NetworkService(TENANT, "files"), KeyId.parse(key_id), kek_id=kek_id, environment_id="a"
            )
            opened = one.hsm.run(
                "unwrap-gcm",
                Reference(label, bytes.fromhex(object_id) if isinstance(object_id, str) else object_id),
                arguments={"wrapped": wrapped.hex(), "binding": binding.hex()},
            )
            needles[key_id] = spellings(bytes.fromhex(opened))
    return Known(needles)


async def valid_s(at: SiteEnvironment) -> float:
    """How long its proxy may still use the keys of `files`, by its own metrics."""
    _, text = await at.proxies[0].health("/metrics")
    [found] = re.findall(r'^sealgate_key_valid_seconds\{.*service="files".*\} (\S+)$', text, re.MULTILINE)
    return float(found)


async def test_b_26_a_proxy_that_was_stopped_refuses_when_it_goes_on(world: World) -> None:
    """SIGSTOP until the keys' end has passed. Nobody can wipe what a stopped process holds: it is not used
    by it any more, it has gone as soon as the process runs, and it comes again with the next refresh."""
    a, b, c = world.three
    of_files = await owners(a, "files")
    proxy = a.proxies[0]
    ciphertext = (await encrypt(a))["ciphertext"]
    config = a.config.read_text()
    await a.agent.stop()
    for name, usual, shorter in zip(("interval_s", "validity_s"), RHYTHM, SHORT_VALIDITY, strict=False):
        assert f"{name} = {usual}\n" in config
        a.config.write_text(a.config.read_text().replace(f"{name} = {usual}\n", f"{name} = {shorter}\n"))
    await a.agent.start()
    try:

        async def lives_by_the_shorter_one() -> bool:
            return 0 < await valid_s(a) <= SHORT_VALIDITY[1] and await serves(a)

        await until(lives_by_the_shorter_one)
        known = await asyncio.to_thread(materials, world, of_files)
        assert len(known.needles) == 3

        async def all_are_there() -> bool:
            return await asyncio.to_thread(in_memory, proxy.program.pid, known) == set(of_files)

        await until(all_are_there)  # the scan finds what it looks for
        # What waits in its sockets already was made before this moment, and ends with what it has.
        proxy.push.inject(Fault.BLACK_HOLE)
        began_s = time.monotonic()
        proxy.program.freeze()
        for other in (b, c):
            assert await decrypt(other, ciphertext) == 200, "nobody else notices"

        async def is_over() -> bool:
            return time.monotonic() > began_s + SHORT_VALIDITY[1] + 2

        await until(is_over)
        proxy.program.thaw()
        status, document = await call(a, "decrypt", ciphertext=ciphertext)
        assert (status, document.get("code")) == (503, "stale"), document

        async def has_gone() -> bool:
            return not await asyncio.to_thread(in_memory, proxy.program.pid, known)

        await until(has_gone)
        assert await decrypt(a, ciphertext) == 503
        proxy.push.inject(Fault.NONE)
        await until(functools.partial(is_decrypted, a, ciphertext, 200))
    finally:
        proxy.program.thaw()
        proxy.push.inject(Fault.NONE)
        await a.agent.stop()
        a.config.write_text(config)
        await a.agent.start()
        await until(functools.partial(serves, a))


async def test_b_21_what_callers_keep_opens_after_everything_was_stopped(world: World) -> None:
    held = []
    for one in world.three:
        held += [await encrypt(one, aad=AAD), await encrypt(one, aad=AAD, anonymous=True)]
    token = (await token_of(world.site["b"], "ann"))["token"]
    programs = [one.agent for one in world.three] + [one.proxies[0].program for one in world.three]
    await asyncio.gather(*(program.stop() for program in programs))
    assert not any(program.runs for program in programs)
    await asyncio.gather(*(one.agent.start() for one in world.three))
    await start(*(one.proxies[0] for one in world.three))
    await all_serve(world)
    for one in world.three:
        for document in held:
            await until(functools.partial(is_decrypted, one, document["ciphertext"], 200, aad=AAD))
        assert await verifies(one, token) == 200


# --- breaches ---


async def test_b_20_25_40_tokens_of_a_breached_signing_key_end_everywhere(world: World) -> None:
    """A signing key and a data key of b are taken away; its environment stays, and so do all other keys."""
    a, b, _ = world.three
    of_files = await owners(a, "files")
    signed, sealed, anonymous = await token_of(b, "bob"), await encrypt(b), await encrypt(b, anonymous=True)
    kept = await encrypt(a)
    lost = sealed["key_id"]
    assert of_files[lost] == "b"
    known = await asyncio.to_thread(materials, world, of_files)
    for one in world.three:
        assert not await lacks(one, signed["key_id"])
        assert await verifies(one, signed["token"]) == 200
    keys = f"{signed['key_id']},{lost}"
    words = ("--env", "b", "--kind", "dek", "--keys", keys, "--reason", "IR-7")
    opened = await world.ask(a, "incident open", *words)
    assert {row["kid"] for row in opened["keys"]} == {signed["key_id"], lost}
    for one in world.three:
        await until(functools.partial(lacks, one, signed["key_id"]))
        assert await verifies(one, signed["token"]) == 423
        assert len(await key_set(one)) == 3 * len(SIGNERS) - 1
        # B-18: forbidden is neither unknown nor damaged; tried is what may be used, and no more.
        await until(functools.partial(is_decrypted, one, sealed["ciphertext"], 423))
        assert await decrypt(one, anonymous["ciphertext"], key_id=lost) == 423
        assert await decrypt(one, anonymous["ciphertext"]) == 422
        assert await decrypt(one, kept["ciphertext"]) == 200
    # B-20: who logs in anew is let in, everywhere, also by b: with a key that is left.
    for one in world.three:
        login = await token_of(one, "bob")
        assert login["key_id"] != signed["key_id"]
        for other in world.three:
            assert await verifies(other, login["token"]) == 200
        assert (await encrypt(one))["key_id"] != lost

    # B-25: a proxy that begins anew is given all keys but that one.
    proxy = a.proxies[0]

    async def has_gone() -> bool:
        return lost not in await asyncio.to_thread(in_memory, proxy.program.pid, known)

    await until(has_gone)
    await proxy.program.stop()
    await start(proxy)
    await until(functools.partial(is_decrypted, a, kept["ciphertext"], 200))
    assert await asyncio.to_thread(in_memory, proxy.program.pid, known) == set(of_files) - {lost}
    assert await decrypt(a, sealed["ciphertext"]) == 423

    await world.ask(a, "incident rekey", opened["incident"])

    async def replaced() -> bool:
        return all(
            {*found.values()} == {*"abc"} for found in [await owners(b, "files"), await owners(b, "signer")]
        )

    await until(replaced, timeout_s=90)
    await until(functools.partial(seals_with, b, {o: k for k, o in (await owners(a, "files")).items()}["b"]))

    async def is_rekeyed() -> bool:
        return bool((await a.ask("incident_status", incident=opened["incident"]))["state"] == "rekeyed")

    await until(is_rekeyed, timeout_s=90)
    await world.ask(a, "incident close", opened["incident"])


async def test_b_14_a_heals_and_b_seals_with_its_key_by_its_own_kek(world: World) -> None:
    """Claim 1: a is suspected and its keys are kept; then its agent and its HSM are away altogether."""
    a, b, c = world.three
    [key] = [key_id for key_id, owner in (await owners(a, "files")).items() if owner == "a"]
    await world.ask(a, "env policy", "files", "pinned", "--key", key)
    words = ("--env", "a", "--kind", "suspected", "--keep-keys", "--reason", "IR-8")
    opened = await world.ask(a, "incident open", *words)
    assert opened["environment_state"] == "healing"

    async def refuses() -> bool:
        status, document = await call(a, "encrypt", key="files", plaintext=HELLO)
        return (status, document.get("code")) == (503, "env-healing")

    await until(refuses)

    async def heals(seen_by: SiteEnvironment) -> bool:
        return bool((await seen_by.ask("env_status", environment="a"))["state"] == "healing")

    for one in (b, c):
        await until(functools.partial(heals, one))
    a.agent.freeze()
    # Its HSM's worker is not frozen, and would be counted with what it is about.
    for worker in children_of(a.agent.pid):
        os.kill(worker, signal.SIGKILL)
        await until(functools.partial(has_ended, worker))
    before = {name: one.counted() for name, one in world.calls.items()}
    a.hsm.unmount()
    # Nothing is left of what they were given before: b and c have to open the key by their own KEKs.
    for one in (b, c):
        await one.proxies[0].program.stop()
        await start(one.proxies[0])
    await until(functools.partial(seals_with, b, key))
    named, anonymous = await encrypt(b), await encrypt(b, anonymous=True)
    assert named["key_id"] == anonymous["key_id"] == key
    for one in (b, c):
        for document in (named, anonymous):
            await until(functools.partial(is_decrypted, one, document["ciphertext"], 200))
    asked = {name: one.counted() - before[name] for name, one in world.calls.items()}
    assert asked["a"].total() == 0, asked["a"]
    for name in "bc":
        assert sum(asked[name][function] for function in OPENING) > 0, asked[name]
