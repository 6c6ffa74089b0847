"""The proxy between S3 clients and a referee: what a client does directly, and what it does through us.

async with s3_site(tmp_path, swift) as site:
    answers = await site.calls([["create_bucket", {"Bucket": "one"}]], via="forward")
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from proxy.tenants.model import LegacyPolicy, ServiceEntry
from proxy.vault.model import Secrets, UpstreamCredential
from tests import pki
from tests.children import output_of
from tests.integration.proxy_rig import REPOSITORY, Rig, proxy
from tests.referees.swift import BIN
from tests.referees.tls_front import clean_environment

CALLS = REPOSITORY / "tests" / "referees" / "boto3_calls.py"
VIAS = ["forward", "reverse"]


class Referee(Protocol):
    """A running S3 service of somebody else's."""

    @property
    def url(self) -> str: ...
    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    def stored(self) -> list[tuple[str, bytes]]: ...


type StartReferee = Callable[..., AbstractAsyncContextManager[Any]]


def body(length: int, seed: int) -> bytes:
    """As boto3_calls.py makes it."""
    return random.Random(seed).randbytes(length)


def content(length: int, seed: int) -> dict[str, object]:
    """A body as boto3_calls.py shows it."""
    return {"bytes": length, "sha256": hashlib.sha256(body(length, seed)).hexdigest()}


def credential(
    access_key: str, secrets: Secrets, *, upstream_access_key: str | None = None
) -> UpstreamCredential:
    return UpstreamCredential(
        access_key=access_key,
        upstream_access_key=upstream_access_key or access_key,
        not_after_s=None,
        created_at_s=0,
        sealed=msgspec.json.encode(secrets),
        opener=lambda sealed: sealed,
    )


@dataclass(frozen=True, slots=True)
class Site:
    rig: Rig
    referee: Any
    service: ServiceEntry
    service_ca: Path

    async def calls(
        self,
        calls: Sequence[Sequence[object]],
        *,
        via: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        style: str = "path",
        config: Mapping[str, object] | None = None,
    ) -> list[Any]:
        """What boto3 makes of *calls*; *via* None: directly."""
        tenant = self.rig.tenants[self.service.owner.tenant]
        endpoint = self.referee.url
        if via == "reverse":
            endpoint = self.rig.reverse_url(self.service, "").replace("127.0.0.1", "localhost")
        spec = {
            "endpoint": endpoint,
            "access_key": access_key or self.referee.access_key,
            "secret_key": secret_key or self.referee.secret_key,
            "ca": str(self.service_ca if via is None else tenant.interception_ca.certificate_file),
            "proxy": f"http://{tenant.forward_listen}" if via == "forward" else None,
            "style": style,
            "config": dict(config or {}),
            "calls": calls,
        }
        process = await asyncio.create_subprocess_exec(
            str(BIN / "python"),
            str(CALLS),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**clean_environment(), "AWS_EC2_METADATA_DISABLED": "true"},
        )
        out, error = await output_of(process, json.dumps(spec).encode())
        assert process.returncode == 0, error.decode()[-2000:]
        answers: list[Any] = json.loads(out)
        return answers

    async def stored(self) -> list[tuple[str, bytes]]:
        found: list[tuple[str, bytes]] = await asyncio.to_thread(self.referee.stored)
        return found

    def open(self, stored: bytes) -> bytes:
        return self.rig.open_independently(self.service.owner, stored)


@contextlib.asynccontextmanager
async def s3_site(
    directory: Path,
    start: StartReferee,
    *,
    options: Mapping[str, object] | None = None,
    legacy: LegacyPolicy = LegacyPolicy.STRICT,
    credentials: Callable[[Any], Mapping[str, UpstreamCredential]] | None = None,
    **of_referee: object,
) -> AsyncIterator[Site]:
    """*credentials*: of the vault; as a default the referee's own key."""
    ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(ca, directory, "server-ca")
    server = pki.write_credential(pki.issue_server(ca, ["localhost", "*.localhost"]), directory, "server")
    async with start(directory, *server, **of_referee) as referee, proxy(directory, ca_file) as rig:
        rig.tenant("acme")
        entry = rig.service("acme/s3", referee.url, profile="s3", legacy=legacy)
        vault = (
            credentials(referee)
            if credentials is not None
            else {
                referee.access_key: credential(referee.access_key, Secrets(client_secret=referee.secret_key))
            }
        )
        entry = rig.services[entry.owner] = dataclasses.replace(
            entry, credentials=vault, profile_options=dict(options or {})
        )
        rig.push(entry.owner)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        assert rig.engine.problems == []
        async with asyncio.TaskGroup() as group:
            cutter = group.create_task(rig.engine.cut_ended(), name="cut")
            yield Site(rig, referee, entry, ca_file)
            cutter.cancel()


def leaks(plain: bytes, stored: bytes, *, step: int = 1024) -> bool:
    """Whether a 16-byte window of *plain* stands anywhere in *stored*."""
    return any(plain[at : at + 16] in stored for at in range(0, max(0, len(plain) - 15), step))
