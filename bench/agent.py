"""The key agent at size: rows `agent_cycle`, `push_1000` and `revoke_1000`.

1. A real agent (registry in SQLite, audit log, worker with SoftHSM2, mutual TLS) in this process; the proxies
   of bench/receivers.py, all of them, in one other: on two cores each has one. Files are in memory.
2. `agent_cycle`: CPU seconds, of worker and agent together, to unwrap the keys of 10,000 network services in
   the HSM and seal them to RSA-2048 certificates. Beside it, of a whole warm cycle to 1,000 proxies: CPU of
   the agent (registry, TLS, HTTP, audit) and of the worker, wall time, and the agent's memory.
3. `push_1000`, `revoke_1000`: wall time from the start of a warm cycle, or from the proof of the revocation,
   until the last of 1,000 proxies has acknowledged, one network service each. Beside it the same with ten
   services each, and a revocation that begins while a cycle is under way.
4. Nothing is cached between rounds that a cycle of a running agent would have to make anew.
"""

import asyncio
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Connection

from bench.machine import BenchError, memory_directory
from bench.receivers import TENANT, VALIDITY_S, proxy_id
from bench.results import Row
from certs import pki
from envelope.certificates import Identity, Role, identity_uri
from envelope.keys import KeyState, NetworkService
from key_agent.agent import Agent
from key_agent.app import opened
from key_agent.collector import spare_what_lives
from key_agent.config import AgentSettings, KeyPairSettings, PushSettings, RefreshSettings, Settings
from key_agent.operations.operations import Operations
from key_agent.push.pusher import Delivery
from key_agent.registry.model import Proxy
from key_agent.sources.pkcs11 import Pkcs11Settings
from key_agent.sources.source import Diagnosis, EnvelopeRequest, NewKey, Recipient, Verdict, WrappedKey
from runtime.observe import configure_logging

NAMES: Final = ("agent_cycle", "push_1000", "revoke_1000")
PROXIES: Final = 1000
SERVICES_PER_PROXY: Final = 10
ROUNDS: Final = 5
PATIENCE_S: Final = 120.0
_AGENT: Final = "hq"
_SOFTHSM: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    f"/usr/lib/{os.uname().machine}-linux-gnu/softhsm/libsofthsm2.so",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An enterprise and its proxies, provisioned but not started."""

    directory: Path
    settings: Settings
    owners: list[list[NetworkService]]
    """By proxy number."""
    certificates: dict[NetworkService, str]
    """PEM."""
    ca_pem: str


def run() -> list[Row]:
    configure_logging(json=True)
    # A log line per proxy and cycle is written in production too, to a file; this one is nobody's.
    with Path(os.devnull).open("w") as nowhere:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(nowhere))
        try:
            few = _measured(1, _deliveries)
            many = _measured(SERVICES_PER_PROXY, _cycle)
        finally:
            structlog.reset_defaults()
    return [
        Row(name="agent_cycle", value=many.pop("sealing_cpu_s"), unit="CPU s", extra={"at_most": 3.0} | {
            name: value for name, value in many.items() if name not in ("push_s", "revoke_s")
        }),
        Row(name="push_1000", value=few["push_s"], unit="s", extra={
            "aim": 1.0, "rounds": ROUNDS, "ten_services_each_s": many["push_s"], "cold_s": few["cold_s"],
        }),
        Row(name="revoke_1000", value=few["revoke_s"], unit="s", extra={
            "aim": 0.5, "rounds": ROUNDS, "ten_services_each_s": many["revoke_s"],
            "during_a_cycle_s": few["revoke_during_push_s"],
        }),
    ]  # fmt: skip


type _Measure = Callable[["Running"], Coroutine[Any, Any, dict[str, float]]]


def _measured(per_proxy: int, measure: _Measure) -> dict[str, float]:
    with memory_directory() as directory:
        directory.chmod(0o700)
        site = make_site(directory, PROXIES, per_proxy)
        with receivers(directory) as ports, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run_site(site, ports, measure))


async def run_site(site: Site, ports: list[int], measure: _Measure) -> dict[str, float]:
    async with _running(site, ports) as running:
        return await measure(running)


# What is measured.


async def _deliveries(running: "Running") -> dict[str, float]:
    found = {"cold_s": await running.push()}
    found["push_s"] = statistics.median([await running.push() for _ in range(ROUNDS)])
    revoked, during = [], []
    for _ in range(ROUNDS):
        revoked.append(await running.revoke())
        await running.consent()
        pushing = asyncio.create_task(running.push(), name="bench:push")
        await asyncio.sleep(0.2)
        during.append(await running.revoke())
        pushing.cancel()
        await asyncio.gather(pushing, return_exceptions=True)
        await running.consent()
    return found | {
        "revoke_s": statistics.median(revoked),
        "revoke_during_push_s": statistics.median(during),
    }


async def _cycle(running: "Running") -> dict[str, float]:
    found = {"cold_s": await running.push()}
    pushes, agent_cpu, worker_cpu, sealing = [], [], [], []
    for _ in range(ROUNDS):
        before = _cpu_s(), running.worker_cpu_s()
        pushes.append(await running.push())
        agent_cpu.append(_cpu_s() - before[0])
        worker_cpu.append(running.worker_cpu_s() - before[1])
        sealing.append(await running.seal())
    revoked = []
    for _ in range(3):
        revoked.append(await running.revoke())
        await running.consent()
    return found | {
        "sealing_cpu_s": statistics.median(sealing),
        "cycle_agent_cpu_s": statistics.median(agent_cpu),
        "cycle_worker_cpu_s": statistics.median(worker_cpu),
        "push_s": statistics.median(pushes),
        "cycle_s": statistics.median(pushes),
        "revoke_s": statistics.median(revoked),
        "agent_rss_mib": _peak_rss_bytes() / 2**20,
        "rounds": ROUNDS,
    }


@dataclass(slots=True, kw_only=True)
class Running:
    """The agent at work, and what the bench does with it."""

    agent: Agent
    operations: Operations
    site: Site

    async def push(self) -> float:
        """Seconds of one cycle: keys to every proxy, all acknowledged."""
        agent = self.agent
        before = dict(agent.deliveries)
        began_s = time.perf_counter()
        agent.refresh.at_once()
        await self._until(lambda: _fresh(agent.deliveries, before))
        return time.perf_counter() - began_s

    async def revoke(self) -> float:
        """Seconds from the proof to the last acknowledgement."""
        agent = self.agent
        kek = agent.consent.kek
        if kek is None:
            raise BenchError("the agent has no KEK")
        before = dict(agent.withdrawals_seen)
        began_s = time.perf_counter()
        # A verdict that withdraws and is not sticky: the next look, at a sound KEK, ends it.
        agent.consent.observe(kek, Diagnosis(Verdict.TOKEN_CHANGED, "bench"))
        await self._until(lambda: agent.withdrawals.count() == 0 and _fresh(agent.withdrawals_seen, before))
        return time.perf_counter() - began_s

    async def consent(self) -> None:
        """The KEK is looked at; keys are everywhere again when this returns."""
        before = dict(self.agent.deliveries)
        self.agent.watch.wake()
        await self._until(lambda: _fresh(self.agent.deliveries, before))

    async def seal(self) -> float:
        """CPU seconds of agent and worker to unwrap and seal every key once, in the agent's batches."""
        agent = self.agent
        kek = agent.consent.kek
        if kek is None:
            raise BenchError("the agent has no KEK")
        wrapped = {key.owner: key for key in await agent.registry.wrapped_keys(kek.reference.kek_id)}
        requests = [
            self._request(number, wrapped[owner])
            for number, owners in enumerate(self.site.owners)
            for owner in owners
        ]
        before_s = _cpu_s() + self.worker_cpu_s()
        for some in batched(requests, agent.rhythm.batch_size):
            results = await agent.source.seal_envelopes(kek, some)
            if not all(len(result.tokens) == 1 for result in results):
                raise BenchError("an envelope was not made")
        return _cpu_s() + self.worker_cpu_s() - before_s

    def _request(self, number: int, key: WrappedKey) -> EnvelopeRequest:
        now_s = int(self.agent.clock.wall_s())
        leaf = self.agent.recipients.check(key.owner, self.site.certificates[key.owner], now_s=now_s)
        recipient = Recipient(
            audience=proxy_id(number),
            nonce=bytes(16),
            certificate_der=leaf.public_bytes(Encoding.DER),
            sequence=now_s * 1000,
        )
        return EnvelopeRequest(
            owner=key.owner,
            keys=((key, KeyState.ACTIVE),),
            recipients=(recipient,),
            issued_at_s=now_s,
            expires_at_s=now_s + VALIDITY_S,
        )

    def worker_cpu_s(self) -> float:
        """Of all workers so far: those that ended, and the one that lives."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        total_s = ended.ru_utime + ended.ru_stime
        pid = getattr(self.agent.source, "worker_pid", None)
        if pid is not None:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total_s += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total_s

    async def _until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline_s:
                failed = {
                    delivery.error
                    for delivery in (*self.agent.deliveries.values(), *self.agent.withdrawals_seen.values())
                    if not delivery.is_complete
                }
                raise BenchError(
                    f"not every proxy has acknowledged within {PATIENCE_S:g} s; {len(failed)} errors: "
                    f"{sorted(map(str, failed))[:3]}"
                )
            await asyncio.sleep(0.01)


def _fresh(found: dict[str, Delivery], before: dict[str, Delivery]) -> bool:
    """Every proxy has a complete delivery that it did not have *before*."""
    return len(found) == PROXIES and all(
        delivery.is_complete and delivery is not before.get(name) for name, delivery in found.items()
    )


def children_cpu_s() -> float:
    """Of all processes that this one has started and that run: the proxies, the HSM's worker."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_s() -> float:
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return mine.ru_utime + mine.ru_stime


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# The site.


def make_site(directory: Path, proxies: int, per_proxy: int) -> Site:
    root = pki.make_root(TENANT)
    authority = pki.make_server_ca("bench")
    _write(directory, "root", root)
    _write(directory, "server", pki.issue_server(authority, ["localhost", "127.0.0.1"]))
    signing = _write(directory, "signing", pki.issue_agent_signing(root, TENANT, _AGENT))
    tls = _write(directory, "tls", pki.issue_agent_tls(root, TENANT, _AGENT))
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    _write_secret(directory / "service.key", pki.key_pem(key))
    owners, certificates = [], {}
    with (directory / "services.jsonl").open("w") as listing:
        for number in range(proxies):
            mine = [NetworkService(TENANT, f"s{number:05}-{index}") for index in range(per_proxy)]
            owners.append(mine)
            for owner in mine:
                pem = pki.certificate_pem(_service_certificate(root, key, owner)).decode()
                certificates[owner] = pem
                listing.write(json.dumps({"proxy": number, "name": owner.service, "pem": pem}) + "\n")
    settings = Settings(
        agent=AgentSettings(
            id=_AGENT,
            tenant=TENANT,
            environment_id="main",
            state_dir=directory / "state",
            root_certificate_file=directory / "root.pem",
        ),
        signing=signing,
        tls=tls,
        pkcs11=_make_token(directory),
        # Only the bench starts a cycle or looks at the KEK.
        refresh=RefreshSettings(interval_s=3000, validity_s=VALIDITY_S, watch_s=3000),
        # A thousand proxies on one core may take their time: nobody gives up on them.
        push=PushSettings(presence_s=60, request_timeout_s=60),
    )
    settings.agent.state_dir.mkdir(mode=0o700)
    return Site(
        directory=directory,
        settings=settings,
        owners=owners,
        certificates=certificates,
        ca_pem=pki.certificate_pem(authority.certificate).decode(),
    )


def _service_certificate(root: pki.Credential, key: rsa.RSAPrivateKey, owner: NetworkService) -> Any:
    uri = identity_uri(Identity(owner.tenant, Role.SERVICE, owner.service))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(pki.name("bench"))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    return pki.sign_service_csr(root, csr)


def _write(directory: Path, stem: str, credential: pki.Credential) -> KeyPairSettings:
    files = KeyPairSettings(certificate_file=directory / f"{stem}.pem", key_file=directory / f"{stem}.key")
    _write_secret(files.key_file, pki.key_pem(credential.key))
    files.certificate_file.write_bytes(pki.certificate_pem(credential.certificate))
    return files


def _write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _make_token(directory: Path) -> Pkcs11Settings:
    module = next((Path(name) for name in _SOFTHSM if Path(name).exists()), None)
    if module is None:
        raise BenchError("libsofthsm2.so is not installed: apt-get install softhsm2")
    tokens, configuration = directory / "tokens", directory / "softhsm2.conf"
    tokens.mkdir(mode=0o700)
    configuration.write_text(
        f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    environment = {"SOFTHSM2_CONF": str(configuration)}
    pin = "4711"
    _write_secret(directory / "pin", pin.encode())
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "bench", "--so-pin", "12345678", "--pin", pin],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    return Pkcs11Settings(
        module_path=module, token_label="bench", pin_file=directory / "pin", environment=environment
    )


@contextlib.contextmanager
def receivers(directory: Path) -> Iterator[list[int]]:
    with (directory / "receivers.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.receivers", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        try:
            line = child.stdout.readline() if child.stdout is not None else b""
            if not line:
                text = (directory / "receivers.log").read_text()
                raise BenchError(f"the simulated proxies did not start: {text[-2000:]}")
            yield json.loads(line)
        finally:
            child.kill()
            child.wait()


@asynccontextmanager
async def _running(site: Site, ports: list[int]) -> AsyncIterator[Running]:
    async with opened(site.settings) as agent:
        operations = Operations(agent)
        await operations.kek_create()
        await _provision(agent, site, ports)
        await agent.reload(kek_changed=True)
        spare_what_lives()
        # The first look at the KEK begins the first cycle; that is the bench's to begin.
        async with agent.working(refresh=True):
            running = Running(agent=agent, operations=operations, site=site)
            yield running


async def _provision(agent: Agent, site: Site, ports: list[int]) -> None:
    targets = [
        Proxy(id=proxy_id(number), url=f"https://127.0.0.1:{port}", ca_pem=site.ca_pem)
        for number, port in enumerate(ports)
    ]
    places = [
        (owner, target.id, site.certificates[owner])
        for target, mine in zip(targets, site.owners, strict=True)
        for owner in mine
    ]
    await write_services(agent, targets, places)


async def write_services(
    agent: Agent, targets: Sequence[Proxy], places: Sequence[tuple[NetworkService, str, str]]
) -> None:
    """What `proxy add` and `service add` write, all of it in one transaction: service, proxy, certificate."""
    row = await agent.registry.current_kek()
    if row is None or row.kek is None:
        raise BenchError("the KEK was not made")
    keys = await agent.source.generate(row.kek, [NewKey(owner=owner) for owner, _, _ in places])
    by_owner = {key.owner: key for key in keys}
    registry = agent.registry
    database = registry._database  # noqa: SLF001
    now_ms = agent.now_ms()

    def fill(connection: Connection) -> None:
        class Together:
            async def transact[T](self, work: Callable[[Connection], T]) -> T:
                return work(connection)

        registry._database = Together()  # type: ignore[assignment]  # noqa: SLF001
        try:
            for target in targets:
                _now(registry.add_proxy(target, now_ms=now_ms))
            for owner, proxy, certificate_pem in places:
                _now(
                    registry.add_service(
                        owner,
                        proxy_id=proxy,
                        certificate_pem=certificate_pem,
                        key=by_owner[owner],
                        now_ms=now_ms,
                    )
                )
        finally:
            registry._database = database  # noqa: SLF001

    await database.transact(fill)


def _now(work: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration:
        return
    raise BenchError("the registry waited")
