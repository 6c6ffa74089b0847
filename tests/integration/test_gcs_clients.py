"""Google's own SDK, and rclone, at two emulators, directly and through the proxy: no undeclared difference.

And then the store is read: nothing of any plaintext lies there, and all that lies there opens by the formats
alone, under the right key and no other.
"""

import asyncio
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from tests.integration.gcs_site import THROUGH, WAYS, Site, Way, emulator_site, program, strict_site
from tests.referees.comparison import Plaintexts, opened
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment

# Digests that are asked for later: ours are none, the service's would be of ciphertext.
_LATER = "kept"

# Uploads that came in several requests: nobody knows their MD5.
_IN_CHUNKS = re.compile(
    r"resumable/(?:262144 False|262145|1048576|1323065|large chunks|checked by|over)|stream if absent, new"
)


def declared(seen: dict[str, Any]) -> Any:
    """*seen* in one step, without what a client may see differently."""
    return _declared(seen, dropped=("md5",) if _IN_CHUNKS.match(seen["step"]) else ())


def _declared(value: Any, *, dropped: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {
            name: sorted(item) if name == _LATER else _declared(item, dropped=dropped)
            for name, item in value.items()
            if name not in dropped
        }
    return [_declared(item, dropped=dropped) for item in value] if isinstance(value, list) else value


def differences(direct: list[dict[str, Any]], through: list[dict[str, Any]]) -> list[str]:
    """Steps that saw something else."""
    assert [item["step"] for item in direct] == [item["step"] for item in through]
    pairs = zip(map(declared, direct), map(declared, through), strict=True)
    return [f"{one}\n  {two}" for one, two in pairs if one != two]


def digests_said(value: Any) -> set[tuple[str, str | None]]:
    """What later answers said of digests, anywhere in *value*."""
    found: set[tuple[str, str | None]] = set()
    if isinstance(value, dict):
        for name, item in value.items():
            found |= set(item.items()) if name == _LATER else digests_said(item)
    elif isinstance(value, list):
        for item in value:
            found |= digests_said(item)
    return found


async def run(place: Site[Any], scratch: Path, *, strict: bool) -> None:
    seeds = {way: secrets.token_hex(8) for way in WAYS}
    results = {}
    for way in WAYS:
        more = {"bucket": f"box-{way}", "seed": seeds[way], "strict": strict, "scratch": str(scratch)}
        results[way] = await program("gcs_scenario.py", place.ways[way].spec(**more))
    for way in THROUGH:
        found = differences(results["direct"]["seen"], results[way]["seen"])
        assert not found, f"{way}:\n" + "\n".join(found)
        assert {value for _, value in digests_said(results[way]["seen"])} == {None}
    assert ("md5", "right") in digests_said(results["direct"]["seen"])
    assert "wrong" not in str(results)
    stored = place.server.stored()
    await asyncio.to_thread(nothing_is_readable, b"".join(content for _, content in stored), seeds)
    for way in THROUGH:
        sealed = place.server.contents(f"box-{way}")
        plain = await asyncio.to_thread(
            opened,
            sealed.items(),
            owner=place.service.owner,
            materials=place.rig.materials[place.service.owner],
            plaintexts=[],
        )
        digests = {name: hashlib.sha256(body).hexdigest() for name, body in plain.items()}
        assert digests == results[way]["contents"], way


def nothing_is_readable(stored: bytes, seeds: dict[str, str]) -> None:
    for way, seed in seeds.items():
        # In every 16 bytes of the scenario's data 8 are the seed's.
        hits = stored.count(hashlib.sha256(seed.encode()).digest()[:8])
        # Directly all of it lies there: the search finds it.
        assert (hits > 100_000) if way == "direct" else (hits == 0), way


async def test_the_sdk_sees_no_difference_with_an_emulator_of_others(tmp_path: Path) -> None:
    async with emulator_site(tmp_path) as place:
        await run(place, tmp_path / "scratch", strict=False)


async def test_the_sdk_sees_no_difference_with_a_strict_service(tmp_path: Path) -> None:
    async with strict_site(tmp_path) as place:
        await run(place, tmp_path / "scratch", strict=True)
        assert place.server.trouble == []


async def rclone(way: Way, *arguments: str) -> tuple[int, bytes, str]:
    """Exit status, output, and its log."""
    proxied = [f"--http-proxy={way.proxy}"] if way.proxy else []
    process = await asyncio.create_subprocess_exec(
        BIN / "rclone", "--config", "", "--ca-cert", str(way.ca_file), "--retries", "1",
        "--low-level-retries", "1", "--gcs-endpoint", f"{way.url}/storage/v1/", "--gcs-anonymous",
        "--gcs-bucket-policy-only", "--gcs-project-number", "1", *proxied, *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )  # fmt: skip
    out, errors = await process.communicate()
    return process.returncode or 0, out, errors.decode()


async def rclone_steps(way: Way, source: Path, bucket: str) -> list[Any]:
    """What each command of a user's afternoon ended with, and what it printed."""
    remote = f":gcs:{bucket}"
    found: list[Any] = []
    for arguments in (
        ("mkdir", remote),
        ("copy", str(source), f"{remote}/dir"),
        ("check", "--download", str(source), f"{remote}/dir"),
        ("lsjson", "-R", "--files-only", remote),
        ("cat", "--offset", "16383", "--count", "9", f"{remote}/dir/a b/x \u00e4"),
        ("copyto", f"{remote}/dir/big", f"{remote}/copy"),
        ("moveto", f"{remote}/dir/one", f"{remote}/moved"),
        ("touch", "--timestamp", "2021-05-06T07:08:09", f"{remote}/copy"),
        ("sync", str(source / "a b"), f"{remote}/dir"),
        ("lsjson", "-R", "--files-only", remote),
        ("cat", f"{remote}/copy"),
        ("deletefile", f"{remote}/missing"),
        ("size", "--json", remote),
    ):
        status, out, errors = await rclone(way, *arguments)
        if arguments[0] == "lsjson":
            fields = ("Path", "Size", "MimeType", "ModTime")
            listed = [[item[name] for name in fields] for item in json.loads(out)]
            found.append([arguments, status, sorted(listed)])
        else:
            found.append([arguments, status, hashlib.sha256(out).hexdigest()])
        known = arguments[0] == "deletefile"
        assert known == (status != 0), (way.name, arguments, errors[-2000:])
    return found


async def test_rclone_sees_no_difference(tmp_path: Path) -> None:
    """It posts chunks, wants no 308, follows mediaLink, and sends `null` with copies."""
    source = tmp_path / "source"
    (source / "a b").mkdir(parents=True)
    plain = {
        "empty": b"",
        "one": b"1",
        "a b/x \u00e4": os.urandom(100_000),
        "big": os.urandom(17 * 1024 * 1024),
    }
    for name, body in plain.items():
        (source / name).write_bytes(body)
    async with strict_site(tmp_path) as place:
        results = {way: await rclone_steps(place.ways[way], source, f"box-{way}") for way in WAYS}
        for way in THROUGH:
            for one, two in zip(results["direct"], results[way], strict=True):
                assert one[1:] == two[1:], (way, one, two)
            sealed = place.server.contents(f"box-{way}")
            assert sealed.keys() == {"copy", "moved", "dir/x \u00e4"}
            known = Plaintexts([plain["a b/x \u00e4"], plain["big"][-200_000:]])
            for name, body in sealed.items():
                assert not known.leak_into(body[-300_000:]), name
            opened(
                sealed.items(),
                owner=place.service.owner,
                materials=place.rig.materials[place.service.owner],
                plaintexts=[],
            )
        assert place.server.trouble == []
