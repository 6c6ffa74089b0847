"""Real S3 clients against real S3 servers, directly and through the proxy: no undeclared difference.

And then the store is read: nothing of any plaintext lies there, and all that lies there opens by the formats
alone, under the right key.
"""

import asyncio
import base64
import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from tests.children import output_of
from tests.integration.s3_site import Site, Way, site
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment

REFEREES = Path(__file__).parents[1] / "referees"
WAYS = ("direct", "forward", "reverse")


async def run(*command: str | Path, environment: dict[str, str], stdin: bytes | None = None) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**clean_environment(), **environment},
    )
    out, errors = await output_of(process, stdin)
    assert process.returncode == 0, errors.decode()[-3000:] + out.decode(errors="replace")[-1000:]
    return out


async def boto3(way: Way, bucket: str, seed: str, server: str, checksums: str) -> dict[str, Any]:
    out = await run(
        BIN / "python",
        REFEREES / "boto3_scenario.py",
        way.endpoint,
        bucket,
        seed,
        server,
        checksums,
        environment=way.environment,
    )
    result: dict[str, Any] = json.loads(out)
    return result


def differences(direct: list[dict[str, Any]], through: list[dict[str, Any]]) -> list[str]:
    """Steps that saw something else."""
    assert [item["step"] for item in direct] == [item["step"] for item in through]
    return [f"{one}\n  {two}" for one, two in zip(direct, through, strict=True) if one != two]


async def downloaded(place: Site, bucket: str) -> dict[str, bytes]:
    """All objects of a bucket as they are stored, by a client that asks the server itself."""
    code = (
        "import boto3,sys,base64,json\n"
        "from botocore.config import Config\n"
        "s=boto3.client('s3',endpoint_url=sys.argv[1],config=Config(s3={'addressing_style':'path'}))\n"
        "keys=[c['Key'] for c in s.list_objects_v2(Bucket=sys.argv[2]).get('Contents',[])]\n"
        "json.dump({k:base64.b64encode(s.get_object(Bucket=sys.argv[2],Key=k)['Body'].read()).decode()"
        " for k in keys},sys.stdout)\n"
    )
    way = place.ways["direct"]
    out = await run(BIN / "python", "-c", code, way.endpoint, bucket, environment=way.environment)

    return {key: base64.b64decode(text) for key, text in json.loads(out).items()}


def canary(seed: str) -> bytes:
    """What stands in every 16 bytes of the scenario's data."""
    return hashlib.sha256(seed.encode()).digest()[:8]


@pytest.mark.parametrize(
    ("server", "checksums"),
    [("swift", "when_supported"), ("swift", "when_required"), ("moto", "when_supported")],
)
async def test_boto3_sees_no_difference(tmp_path: Path, server: str, checksums: str) -> None:
    async with site(tmp_path, server) as place:
        seeds = {way: secrets.token_hex(8) for way in WAYS}
        results = {
            way: await boto3(place.ways[way], f"bucket-{way}", seeds[way], server, checksums) for way in WAYS
        }
        for way in ("forward", "reverse"):
            found = differences(results["direct"]["seen"], results[way]["seen"])
            assert not found, f"{way}:\n" + "\n".join(found)
        assert len(results["direct"]["seen"]) > 50
        stored = b"".join(content for _, content in place.server.stored())
        for way in WAYS:
            hits = stored.count(canary(seeds[way]))
            # Directly all of it lies there: the search finds it.
            assert (hits > 1_000_000) if way == "direct" else (hits == 0), way
        for way in ("forward", "reverse"):
            objects = await downloaded(place, f"bucket-{way}")
            assert objects.keys() == results[way]["contents"].keys()
            for key, content in objects.items():
                digest = hashlib.sha256(place.opened(content)).hexdigest()
                assert digest == results[way]["contents"][key], key
