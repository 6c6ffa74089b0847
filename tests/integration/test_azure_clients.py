"""Microsoft's own SDK against Azurite, directly and through the proxy: no undeclared difference.

And then the store is read: nothing of any plaintext lies there, and all that lies there opens by the formats
alone, under the right key and no other.
"""

import asyncio
import base64
import hashlib
import re
import secrets
from pathlib import Path
from typing import Any, Final

import pytest

from tests.integration.azure_site import WAYS, Site, program, site
from tests.referees.comparison import opened

# No checksum that the client has not sent itself; and what is opened is `private`.
_CHECKSUMS: Final = ("content_crc64", "content_md5")
_OURS: Final = re.compile(r", private$|box-(?:direct|forward|reverse)")


def declared(value: Any) -> Any:
    """*value* without what a client may see differently."""
    if isinstance(value, dict):
        return {name: declared(item) for name, item in value.items()}
    if isinstance(value, list):
        return [declared(item) for item in value if item not in _CHECKSUMS]
    if value == "private":
        return None
    return _OURS.sub("", value) if isinstance(value, str) else value


def differences(direct: list[dict[str, Any]], through: list[dict[str, Any]]) -> list[str]:
    """Steps that saw something else."""
    assert [item["step"] for item in direct] == [item["step"] for item in through]
    pairs = zip(declared(direct), declared(through), strict=True)
    return [f"{one}\n  {two}" for one, two in pairs if one != two]


@pytest.mark.parametrize("style", ["account-in-path", "account-in-host"])
async def test_the_sdk_sees_no_difference(tmp_path: Path, style: str) -> None:
    """In the second style clients have a key of the proxy's, which Azurite does not know."""
    is_host = style == "account-in-host"
    async with site(tmp_path, host_style=is_host, gateway=is_host) as place:
        seeds = {way: secrets.token_hex(8) for way in WAYS}
        results = {}
        for way in WAYS:
            spec = place.ways[way].spec(container=f"box-{way}", seed=seeds[way])
            results[way] = await program("azure_scenario.py", spec)
        for way in ("forward", "reverse"):
            found = differences(results["direct"]["seen"], results[way]["seen"])
            assert not found, f"{way}:\n" + "\n".join(found)
        assert len(results["direct"]["seen"]) > 150
        await store_is_sealed(place, seeds, results)


async def store_is_sealed(place: Site, seeds: dict[str, str], results: dict[str, Any]) -> None:
    extents = await asyncio.to_thread(lambda: b"".join(content for _, content in place.server.stored()))
    for way in WAYS:
        # In every 16 bytes of the scenario's data 8 are the seed's.
        canary = hashlib.sha256(seeds[way].encode()).digest()[:8]
        hits = extents.count(canary)
        # Directly all of it lies there: the search finds it.
        assert (hits > 100_000) if way == "direct" else (hits == 0), way
    stored = await program("azure_stored.py", place.ways["direct"].spec())
    for way in ("forward", "reverse"):
        blobs = {name: base64.b64decode(text) for name, text in stored[f"box-{way}"].items()}
        plain = await asyncio.to_thread(
            opened,
            blobs.items(),
            owner=place.service.owner,
            materials=place.rig.materials[place.service.owner],
            plaintexts=[],
        )
        contents = results[way]["contents"]
        assert contents.keys() <= plain.keys()
        assert {name for name in plain if not re.search(r" 20[0-9-]+T", name)} == contents.keys()
        for name, digest in contents.items():
            assert hashlib.sha256(plain[name]).hexdigest() == digest, name
