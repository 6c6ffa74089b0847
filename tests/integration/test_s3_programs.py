"""Command-line clients of S3 through the proxy as without it: aws, rclone and curl, forward and reverse.

Each does the same three times, with bytes of its own, and has to say the same. The store must hold none of
what went through the proxy.
"""

import asyncio
import hashlib
import json
import os
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.children import output_of
from tests.integration.s3_site import HOST, Way, site
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment

MIB = 1024 * 1024
NAME = "store.test"


@pytest.fixture(autouse=True)
def _name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the service that only the proxy can resolve: Go sends no loopback name to a proxy."""
    real = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **more: Any) -> Any:
        known = host in (NAME, NAME.encode())
        return real("127.0.0.1" if known else host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


async def run(*command: str | Path, environment: dict[str, str], cwd: Path) -> str:
    """Its exit code, and what it has printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**clean_environment(), **environment, "HOME": str(cwd)},
        cwd=cwd,
    )
    out, _ = await output_of(process)
    return f"{process.returncode} {out.decode(errors='replace')}"


def tree(directory: Path, canary: bytes) -> dict[str, str]:
    """Files of many sizes; names and SHA-256 of each. The canary stands in every 16 bytes of them."""
    directory.parent.mkdir()
    found: dict[str, str] = {}
    sizes = {"empty": 0, "one": 1, "chunk": 16384, "a b+ü.txt": 40_000, "sub/large.bin": 6 * MIB + 3}
    for name, size in sizes.items():
        made = bytearray(os.urandom(size))
        for at, byte in enumerate(canary):
            made[at::16] = bytes([byte]) * len(made[at::16])
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        found[name] = hashlib.sha256(made).hexdigest()
    return found


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def in_any_order(told: str) -> str:
    code, _, text = told.partition(" ")
    return f"{code} " + "\n".join(sorted(text.splitlines()))


def plain(told: str) -> str:
    """Without what differs between two runs of one program: times, speeds, ports and tags."""
    # Opened answers are no shared cache's: `private` is declared.
    text = told.replace('    "CacheControl": "private",\n', "")
    text = re.sub(r"[0-9a-f]{32}(-[0-9]+)?", "TAG", text)
    text = re.sub(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}[T ][0-9:.]+(\+00:00|Z)?", "TIME", text)
    return re.sub(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} 20[0-9 :]+ GMT", "TIME", text)


async def aws(way: Way, work: Path, canary: bytes) -> list[Any]:
    """The AWS CLI: what it says, and whether what it brings back is right."""
    sent = tree(work / "in", canary)
    bucket = f"aws-{way.name}"
    settings = "addressing_style = path\n  multipart_threshold = 5MB\n  multipart_chunksize = 5MB"
    (work / "config").write_text(f"[default]\ns3 =\n  {settings}\n")
    environment = {**way.environment, "AWS_CONFIG_FILE": str(work / "config")}

    async def cli(*arguments: str) -> str:
        return await run(
            BIN / "aws", "--endpoint-url", way.endpoint, *arguments, environment=environment, cwd=work
        )

    quiet = ["--no-progress"]
    told = [
        await cli("s3", "mb", f"s3://{bucket}"),
        in_any_order(await cli("s3", "sync", *quiet, "in", f"s3://{bucket}/x")),
        await cli("s3", "sync", *quiet, "--size-only", "in", f"s3://{bucket}/x"),
        await cli("s3", "ls", "--recursive", "--summarize", f"s3://{bucket}/"),
        in_any_order(await cli("s3", "sync", *quiet, f"s3://{bucket}/x", "out")),
        await cli("s3", "mv", *quiet, f"s3://{bucket}/x/sub/large.bin", f"s3://{bucket}/moved"),
        await cli("s3", "cp", *quiet, f"s3://{bucket}/moved", "moved"),
    ]
    large = (work / "in" / "sub" / "large.bin").read_bytes()
    right: list[Any] = [
        digests(work / "out") == sent,
        (work / "moved").read_bytes() == large,
    ]
    return [plain(text.replace(bucket, "BUCKET")) for text in told] + right


async def rclone(way: Way, work: Path, canary: bytes) -> list[Any]:
    """rclone, Go's S3 client, by HTTP/2 where it is spoken."""
    sent = tree(work / "in", canary)
    environment = {
        **{name: value for name, value in way.environment.items() if not name.startswith("AWS_")},
        "RCLONE_CONFIG": "/dev/null",
        "RCLONE_CONFIG_S_TYPE": "s3",
        "RCLONE_CONFIG_S_PROVIDER": "Other",
        "RCLONE_CONFIG_S_ENDPOINT": way.endpoint,
        "RCLONE_CONFIG_S_ACCESS_KEY_ID": way.access_key,
        "RCLONE_CONFIG_S_SECRET_ACCESS_KEY": way.secret_key,
        "RCLONE_CONFIG_S_REGION": "us-east-1",
        "RCLONE_CA_CERT": str(way.ca_file),
        "RCLONE_LOW_LEVEL_RETRIES": "1",
        "RCLONE_RETRIES": "1",
        "RCLONE_S3_UPLOAD_CUTOFF": "5Mi",
        "RCLONE_S3_CHUNK_SIZE": "5Mi",
        "RCLONE_S3_COPY_CUTOFF": "5Mi",
    }
    bucket = f"rclone-{way.name}"

    async def cli(*arguments: str) -> str:
        return await run(BIN / "rclone", *arguments, environment=environment, cwd=work)

    async def moved(*arguments: str) -> list[Any]:
        """Exit code and how many files a transfer has moved."""
        text = await cli(*arguments, "--stats-one-line", "--use-json-log", "-v", "--stats", "0s")
        count = text.count('"msg":"Copied (')
        return [text.partition(" ")[0], count, "" if text.startswith("0 ") else text]

    told: list[Any] = [
        (await cli("mkdir", f"s:{bucket}")).partition(" ")[0],
        await moved("sync", "in", f"s:{bucket}/x"),
        # Nothing has changed: nothing moves. Sizes and times have to be the plaintext's.
        await moved("sync", "in", f"s:{bucket}/x"),
        (await cli("check", "--download", "in", f"s:{bucket}/x")).partition(" ")[0],
        await moved("sync", f"s:{bucket}/x", "out"),
        await cli("size", f"s:{bucket}"),
        await moved("copyto", f"s:{bucket}/x/sub/large.bin", f"s:{bucket}/copied"),
        (await cli("touch", "-t", "2026-01-02T03:04:05", f"s:{bucket}/copied")).partition(" ")[0],
        await cli("lsl", f"s:{bucket}/copied"),
        await moved("copyto", f"s:{bucket}/copied", "copied"),
    ]
    entries = await cli("lsjson", "-R", "--files-only", f"s:{bucket}")
    files = json.loads(entries.partition(" ")[2])
    told.append(sorted((item["Path"], item["Size"], item["ModTime"]) for item in files))
    cat = BIN / "rclone", "cat", "--offset", str(5 * MIB - 4), "--count", "9", f"s:{bucket}/copied"
    process = await asyncio.create_subprocess_exec(
        *cat, stdout=asyncio.subprocess.PIPE, env={**clean_environment(), **environment}, cwd=work
    )
    piece, _ = await output_of(process)
    large = (work / "in" / "sub" / "large.bin").read_bytes()
    told += [
        piece == large[5 * MIB - 4 : 5 * MIB + 5],
        digests(work / "out") == sent,
        (work / "copied").read_bytes() == large,
    ]
    return told


async def curl(way: Way, work: Path, canary: bytes) -> list[Any]:
    """curl, which signs by itself."""
    sent = tree(work / "in", canary)
    bucket = f"curl-{way.name}"
    common = ["--silent", "--show-error", "--cacert", str(way.ca_file), "--aws-sigv4", "aws:amz:us-east-1:s3"]
    common += ["--user", f"{way.access_key}:{way.secret_key}", "--max-time", "60"]
    common += ["--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]
    if way.proxy is not None:
        common += ["--proxy", way.proxy]
    else:
        common += ["--noproxy", "*"]
    show = ["--write-out", "%{http_code} %{size_download} %header{content-length} %header{content-range}"]

    async def ask(path: str, *arguments: str) -> str:
        return await run(
            "curl", *common, *show, *arguments, f"{way.endpoint}/{bucket}{path}", environment={}, cwd=work
        )

    told = [
        await ask("", "-X", "PUT"),
        await ask("/one", "--upload-file", "in/one"),
        await ask("/large", "--upload-file", "in/sub/large.bin"),
        await ask("/large", "--head"),
        await ask("/large", "--output", "large"),
        await ask("/large", "--output", "piece", "--range", "16380-16390"),
        await ask("/large", "--output", "tail", "--range", "-7"),
        (await ask("/large", "--output", "none", "--range", f"{10 * MIB}-"))[:5],
        await ask("/missing", "--output", "none"),
        await ask("/one", "-X", "DELETE"),
        await ask("/one", "--output", "none"),
    ]
    (work / "resumed").write_bytes((work / "large").read_bytes()[:1_000_000])
    told.append(await ask("/large", "--output", "resumed", "--continue-at", "-"))
    large = (work / "in" / "sub" / "large.bin").read_bytes()
    assert sent
    return [
        # The head's own lines are the service's; its numbers are what counts.
        *(text if "HTTP/" not in text else text.rpartition("\n")[2] for text in told),
        (work / "large").read_bytes() == large,
        (work / "piece").read_bytes() == large[16380:16391],
        (work / "tail").read_bytes() == large[-7:],
        (work / "resumed").read_bytes() == large,
    ]


type Program = Callable[[Way, Path, bytes], Awaitable[list[Any]]]


@pytest.mark.parametrize(
    ("program", "server", "gateway"),
    [
        pytest.param(aws, "swift", False, id="aws"),
        pytest.param(rclone, "swift", True, id="rclone with a gateway key"),
        pytest.param(curl, "moto", True, id="curl"),  # Swift's access keys have a colon: not curl's
    ],
)
async def test_a_program_sees_no_difference(
    tmp_path: Path, program: Program, server: str, gateway: bool
) -> None:
    host = NAME if program is rclone else HOST  # moto takes the other for a bucket's name
    async with site(tmp_path, server, gateway=gateway, server_host=host) as place:
        canaries = {name: os.urandom(8) for name in place.ways}
        seen = {
            name: await program(way, tmp_path / f"work-{name}", canaries[name])
            for name, way in place.ways.items()
        }
        assert all(item is not False for item in seen["direct"]), seen["direct"]
        for name in ("forward", "reverse"):
            pairs = list(zip(seen["direct"], seen[name], strict=True))
            different = [f"{one}\n  {two}" for one, two in pairs if one != two]
            assert not different, f"{name}:\n" + "\n".join(different)
        stored = b"".join(content for _, content in place.server.stored())
        assert stored.count(canaries["direct"]) > 10_000
        assert stored.count(canaries["forward"]) == stored.count(canaries["reverse"]) == 0
