"""The proxy's data plane on real sockets: engine, key cache, audit log, a WebDAV server, curl.

Keys are installed into the cache as the receiver does it. Everything else is the real part.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from envelope.derive import object_key
from envelope.keys import KeyId, KeyMaterial, KeyState, NetworkService
from envelope.objects import Opener
from proxy.addon import SealgateAddon
from proxy.bodies.collecting import Collecting
from proxy.bodies.prefetch import Prefetch
from proxy.bodies.spool import Spools
from proxy.config import EngineSettings
from proxy.engine import Engine, upstream_trust
from proxy.environments import Environments
from proxy.keys.cache import KeyCache
from proxy.limits import ClientLimits
from proxy.metrics import ProxyMetrics
from proxy.profiles import PROFILES, Profile
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import (
    CertificateFiles,
    Directory,
    LegacyPolicy,
    Listen,
    ServiceEntry,
    TenantEntry,
    Upstream,
)
from proxy.uploads import UploadStore
from proxy.users.model import Password, UserEntry
from runtime.audit import AuditLog
from runtime.clock import SystemClock
from tests import pki
from tests.children import output_of
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[2]


async def until(condition: Callable[[], bool], *, timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError
        await asyncio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Answer:
    """What curl saw. `exit_code` 0: a complete answer; 18, 56, 92: cut."""

    status: int
    headers: dict[str, str]
    body: bytes
    exit_code: int
    version: str
    error: str

    @property
    def code(self) -> str | None:
        return self.headers.get("sealgate-error")


@dataclass(slots=True)
class Rig:
    directory: Path
    settings: EngineSettings
    keys: KeyCache
    audit: AuditLog
    metrics: ProxyMetrics
    registry: CollectorRegistry
    engine: Engine
    environments: Environments = field(default_factory=Environments)
    tenants: dict[str, TenantEntry] = field(default_factory=dict)
    services: dict[NetworkService, ServiceEntry] = field(default_factory=dict)
    materials: dict[NetworkService, dict[KeyId, bytes]] = field(default_factory=dict)
    users: dict[tuple[str, str], UserEntry] = field(default_factory=dict)
    revision: int = 0

    # ---- provisioning

    def tenant(self, name: str, *, tunnel_hosts: Iterable[str] = ()) -> TenantEntry:
        ca = pki.make_interception_ca(name)
        certificate_file, key_file = pki.write_credential(ca, self.directory, f"{name}-interception")
        entry = TenantEntry(
            tenant=name,
            root_certificate=pki.make_tenant(name).root.certificate,
            forward_listen=Listen("127.0.0.1", free_port()),
            tunnel_hosts=frozenset(tunnel_hosts),
            interception_ca=CertificateFiles(certificate_file=certificate_file, key_file=key_file),
        )
        self.tenants[name] = entry
        return entry

    def service(
        self,
        owner: str,
        upstream: str,
        *,
        legacy: LegacyPolicy = LegacyPolicy.STRICT,
        profile: str = "generic",
    ) -> ServiceEntry:
        entry = ServiceEntry(
            owner=NetworkService.parse(owner),
            upstream=Upstream.parse(upstream),
            profile=profile,
            legacy=legacy,
            reverse_listen=Listen("127.0.0.1", free_port()),
            certificate=None,
            key_file=self.directory / "unused",
        )
        self.services[entry.owner] = entry
        return entry

    def picture(self) -> Directory:
        self.revision += 1
        return Directory.of(self.revision, self.tenants.values(), self.services.values(), users=self.users)

    def user(self, tenant: str, name: str) -> str:
        """A new user's password."""
        password = Password.draw(tenant, name)
        self.users[tenant, name] = UserEntry(
            tenant=tenant, name=name, verifier=password.verifier, created_at_s=0
        )
        return password.text

    def push(
        self,
        owner: NetworkService,
        *,
        validity_s: float = 300,
        key_id: KeyId | None = None,
        state: KeyState = KeyState.ACTIVE,
        material: bytes | None = None,
    ) -> KeyId:
        """What one accepted envelope does."""
        key_id = key_id or KeyId.random()
        known = self.materials.setdefault(owner, {})
        secret = known.setdefault(key_id, material or os.urandom(32))
        deadline = SystemClock().boot_s() + validity_s
        version = list(known).index(key_id) + 1
        key = KeyMaterial(owner=owner, key_id=key_id, state=state, version=version, secret=bytearray(secret))
        self.keys.install(owner, [key], deadline_boot_s=deadline)
        return key_id

    # ---- judging

    def open_independently(self, owner: NetworkService, stored: bytes) -> bytes:
        opener = Opener(
            owner, lambda header: object_key(self.materials[owner][header.key_id], owner, header.key_id)
        )
        return bytes(opener.update(stored)) + opener.finalize()

    def audit_lines(self) -> list[str]:
        return self.audit.path.read_text().splitlines()

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    # ---- the client

    def reverse_url(self, service: ServiceEntry, path: str) -> str:
        assert service.reverse_listen is not None
        return f"https://127.0.0.1:{service.reverse_listen.port}{path}"

    def forward_url(self, service: ServiceEntry, path: str) -> str:
        return f"{service.upstream}{path}"

    def curl_arguments(self, service: ServiceEntry, mode: str, path: str) -> list[str]:
        tenant = self.tenants[service.owner.tenant]
        trust = ["--cacert", str(tenant.interception_ca.certificate_file)]
        if mode == "reverse":
            return [*trust, self.reverse_url(service, path)]
        return [*trust, "-x", f"http://{tenant.forward_listen}", self.forward_url(service, path)]

    async def ask(
        self,
        service: ServiceEntry,
        path: str,
        *arguments: str,
        mode: str = "reverse",
        body: bytes | None = None,
        output: str = "-",
    ) -> Answer:
        """One request by curl; *body* goes in by stdin where an argument names `-` or `@-`."""
        return await curl(*arguments, *self.curl_arguments(service, mode, path), body=body, output=output)


_HEAD: Final = b"\n--curl-head--\n"


async def curl(
    *arguments: str, body: bytes | None = None, timeout_s: float = 60, output: str = "-"
) -> Answer:
    return await (await begin_curl(*arguments, timeout_s=timeout_s, output=output)).answer(body)


@dataclass(frozen=True, slots=True)
class Running:
    """A request of curl that is under way."""

    process: asyncio.subprocess.Process

    async def answer(self, body: bytes | None = None, *, begun: bytes = b"") -> Answer:
        """*begun*: what the caller has read of its output."""
        out, error = await output_of(self.process, body)
        content, _, tail = (begun + out).rpartition(_HEAD)
        first, _, rest = tail.decode().partition("\n")
        status, _, version = first.partition(" ")
        return Answer(
            status=int(status),
            headers=_headers(rest),
            body=content,
            exit_code=self.process.returncode or 0,
            version=version,
            error=error.decode(),
        )


async def begin_curl(*arguments: str, timeout_s: float = 60, output: str = "-") -> Running:
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    return Running(
        await asyncio.create_subprocess_exec(
            "curl",
            "--silent",
            "--show-error",
            "--output",
            output,
            "--max-time",
            str(timeout_s),
            "--write-out",
            _HEAD.decode() + "%{http_code} %{http_version}\n%{header_json}",
            "--suppress-connect-headers",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
    )


def _headers(text: str) -> dict[str, str]:
    try:
        raw: dict[str, list[str]] = json.loads(text)
    except ValueError:
        return {}
    return {name.lower(): ", ".join(values) for name, values in raw.items()}


@dataclass(frozen=True, slots=True)
class Origin:
    """A running WebDAV server and what it stores."""

    port: int
    root: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def stored(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@contextlib.asynccontextmanager
async def webdav(directory: Path, certificate_file: Path, key_file: Path) -> AsyncIterator[Origin]:
    root = directory / "store"
    root.mkdir()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.webdav_server",
        str(root),
        str(certificate_file),
        str(key_file),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            port = int(await process.stdout.readline())
        yield Origin(port, root)
    finally:
        process.terminate()
        async with asyncio.timeout(30):
            await process.wait()


@contextlib.asynccontextmanager
async def proxy(
    directory: Path,
    ca_file: Path | None,
    *,
    http2: bool = True,
    wait_s: float = 0.2,
    proxy_certificate: tuple[Path, Path] | None = None,
    environment: str | None = None,
    profiles: Mapping[str, Profile] = PROFILES,
    database_dir: Path | None = None,
    limits: ClientLimits | None = None,
    spools: Spools | None = None,
    collecting: Collecting | None = None,
) -> AsyncIterator[Rig]:
    """A stopped engine with all round it: provision, then `await rig.engine.start(rig.picture())`.

    Proxies with one *database_dir* share what is remembered of uploads.
    """
    clock = SystemClock()
    registry = CollectorRegistry()
    own_file, own_key_file = proxy_certificate or (None, None)
    engine_settings = EngineSettings(
        http2=http2,
        upstream_ca_file=ca_file,
        proxy_certificate_file=own_file,
        proxy_key_file=own_key_file,
    )
    audit = AuditLog.open(directory / "audit.jsonl", clock)
    keys = KeyCache(clock)
    metrics = ProxyMetrics(registry)
    database_dir = database_dir or directory / "uploads"
    database = f"sqlite:///{database_dir / 'directory.db'}"
    DirectoryStore.open(database, database_dir, clock=clock).close()  # makes the schema
    async with (
        Prefetch(upstream_trust(engine_settings.upstream_ca_file)) as prefetch,
        UploadStore.open(database, clock=clock) as uploads,
    ):
        environments = Environments(environment, on_refused=keys.withdraw_tenant)
        addon = SealgateAddon(
            keys=keys,
            audit=audit,
            prefetch=prefetch,
            metrics=metrics,
            wait_s=wait_s,
            uploads=uploads,
            spools=spools,
            collecting=collecting,
            environments=environments,
        )
        engine = Engine(engine_settings, addon, clock, limits=limits, profiles=profiles)
        rig = Rig(directory, engine_settings, keys, audit, metrics, registry, engine, environments)
        try:
            yield rig
        finally:
            await engine.stop(grace_s=0)
            keys.close()
            audit.close()
