"""`sealgate doctor`: what is wrong with an installation, and how to mend it.

1. Checks only look: nothing is created, changed or migrated. Network checks talk to what is configured alone.
2. A check that another one's failure makes pointless is left out rather than failed.
3. It works beside a running proxy: the proxy is asked whether it is ready, its listeners are not opened.
"""

import asyncio
import fcntl
import json
import os
import resource
import socket
import ssl
import stat
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Final

import certifi
from cryptography import x509

from envelope.audit import BrokenChainError
from envelope.certificates import CertificateError, Identity, Role, verify_certificate
from proxy.config import Settings, database_url
from proxy.encryption_service.credentials import FILE_KEY_DIRECTORY, SecretSealer
from proxy.encryption_service.dialects.kacls_reach import check_kacls
from proxy.encryption_service.model import CredentialKind, DialectName, ServiceDirectory
from proxy.encryption_service.outbound import Outbound, outbound_context
from proxy.encryption_service.settings import EncryptionServiceSettings, ListenSettings, OutboundSettings
from proxy.profiles import PROFILES
from proxy.tenants.certificates import CredentialError, check_root, read_certificate, read_private_key
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.errors import DirectoryUnavailableError, NoDirectoryError
from proxy.tenants.model import Directory, Listen, Recipient, ServiceEntry, TenantEntry
from proxy.vault.model import VaultError
from runtime import machine
from runtime.audit import mend_broken
from runtime.audit_files import read_chain
from runtime.clock import Clock
from runtime.doctor import Check, failed, ok, validity, warning
from runtime.lifecycle import harden_process
from runtime.settings import SettingsError, read_secret_file
from runtime.tls import TlsError, load_certificates, server_context

CONNECT_TIMEOUT_S: Final = 5.0
MIN_FREE_BYTES: Final = 256 << 20
MIN_OPEN_FILES: Final = 4096
_MAX_ANSWER_BYTES: Final = 1 << 20
_INSTALL: Final = "pip install --require-hashes -r requirements-proxy.lock"


def examine(config_file: Path, load: Callable[[], Settings], clock: Clock) -> list[Check]:
    """Every check that makes sense for the installation that *load* describes."""
    try:
        settings = load()
        url = database_url(settings.proxy)
    except SettingsError as error:
        return [failed("configuration", str(error), f"mend {config_file}, then `sealgate --check-config`")]
    is_running = _is_running(settings.proxy.audit_file)
    checks = [ok("configuration", f"{config_file}, proxy {'running' if is_running else 'not running'}")]
    checks += _process()
    checks += _engine()
    checks += machine.check_clock()
    checks += _state_dir(settings.proxy.state_dir)
    for audit_file in settings.proxy.audit_files():
        checks += _audit(audit_file, is_running=is_running)
    checks += _push_identity(settings, clock)
    for listen in settings.encryption_service.listen:
        checks += _service_identity(listen, clock)
    trust, check = _trust(settings.engine.upstream_ca_file or Path(certifi.where()))
    checks.append(check)
    listeners = {
        "push": Listen(settings.push.host, settings.push.port),
        "health": Listen(settings.health.host, settings.health.port),
    }
    for listen in settings.encryption_service.listen:
        listeners[f"encryption service at {listen.name}"] = Listen(listen.address, listen.port)
    try:
        with DirectoryStore.open(url, settings.proxy.state_dir, clock=clock, migrate=False) as store:
            directory, in_use = store.snapshot(), store.private_keys()
    except NoDirectoryError:
        checks.append(ok("database", "nothing is provisioned yet: the first `sealgate tenant add` makes it"))
        return [*checks, *_network(listeners, is_running=is_running)]
    except DirectoryUnavailableError as error:
        checks.append(failed("database", str(error), "check proxy.database_url, disk and database server"))
        return [*checks, *_network(listeners, is_running=is_running)]
    checks.append(ok("database", f"revision {directory.revision}"))
    for tenant in directory.tenants.values():
        checks += _tenant(tenant, clock)
        if tenant.forward_listen is not None:
            listeners[f"forward proxy of {tenant.tenant}"] = tenant.forward_listen
    for service in directory.services.values():
        checks += _service(service, directory, clock)
        if service.reverse_listen is not None:
            listeners[f"reverse proxy of {service.owner}"] = service.reverse_listen
    for key in directory.encryption_service.keys.values():
        checks += _recipient("key", key, directory, clock)
    checks += unheard_dialects(directory.encryption_service, settings.encryption_service)
    checks += _stored_secrets(directory, settings.proxy.state_dir)
    checks += _stray_keys(settings.proxy.state_dir, in_use)
    if any(DialectName.KACLS in listen.dialects for listen in settings.encryption_service.listen):
        checks += _token_issuers(directory.encryption_service, settings.encryption_service.outbound)
    checks += _network(listeners, is_running=is_running)
    if trust is not None:
        checks += asyncio.run(_upstreams(directory.services.values(), trust))
    return checks


# This machine.


def _is_running(audit_file: Path) -> bool:
    """Whether some process holds the audit log, as `sealgate run` does."""
    try:
        descriptor = os.open(audit_file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _process() -> Iterator[Check]:
    for cause in harden_process():
        yield warning("memory", cause, "start it by the systemd unit in deploy/, which sets the limits")
    yield from machine.check_cores()
    yield from machine.check_swap()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        mend = f"allow at least {MIN_OPEN_FILES} (LimitNOFILE=): a flow through the proxy needs two"
        yield warning("open files", f"at most {hard}", mend)


def _engine() -> Iterator[Check]:
    # Imported here: mitmproxy takes longer to import than most commands take to run.
    try:
        from proxy import gate  # noqa: PLC0415
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        yield failed("engine", f"the package {name} is not installed here", _INSTALL)
        return
    try:
        gate.check_versions()
    except gate.UnknownEngineError as error:
        yield failed("engine", str(error), _INSTALL)
    else:
        yield ok("engine", "mitmproxy and what it leans on are the versions that were tested")


def _state_dir(path: Path) -> Iterator[Check]:
    try:
        status = path.stat()
        space = os.statvfs(path)
    except FileNotFoundError:
        yield ok("state_dir", f"{path}: not there yet; the first `sealgate tenant add` makes it")
        return
    except OSError as error:
        yield failed("state_dir", f"{path}: {error.strerror}", "name a directory of this user's own")
        return
    if not stat.S_ISDIR(status.st_mode):
        yield failed("state_dir", f"{path} is not a directory", "name a directory in proxy.state_dir")
    elif status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        yield failed("state_dir", f"{path} has mode {mode:04o}; it holds private keys", f"chmod 700 {path}")
    elif status.st_uid != os.geteuid():
        mend = f"run this command as user {status.st_uid}, or chown {path}"
        yield failed("state_dir", f"{path} belongs to user {status.st_uid}, we are {os.geteuid()}", mend)
    elif (free_bytes := space.f_bavail * space.f_frsize) < MIN_FREE_BYTES:
        mend = "free space: when the audit log cannot be written, everything is refused"
        yield warning("state_dir", f"{path} has {free_bytes >> 20} MiB left", mend)
    else:
        yield ok("state_dir", str(path))


def _audit(path: Path, *, is_running: bool) -> Iterator[Check]:
    try:
        with path.open("rb") as file:
            head = read_chain(file).head  # a torn last line is being written, or `run` sets it aside
    except FileNotFoundError:
        yield ok("audit log", f"{path} not begun")
        return
    except OSError as error:
        yield failed("audit log", f"{path}: {error.strerror}", "make it readable for the proxy's user alone")
        return
    except BrokenChainError as error:
        yield failed("audit log", f"{path}: {error}", f"stop the proxy; {mend_broken(path)}")
        return
    state = "in use" if is_running else "closed"
    yield ok("audit log", f"{path}: {head.seq} events, chain holds, {state}")


def _push_identity(settings: Settings, clock: Clock) -> Iterator[Check]:
    push = settings.push
    try:
        read_secret_file(push.key_file)[:] = b""
        server_context(push.certificate_file, push.key_file, client_roots=())
        certificate = load_certificates(push.certificate_file)[0]
    except (SettingsError, TlsError) as error:
        mend = getattr(
            error, "next_step", f"a PEM key that only the proxy's user may read: chmod 600 {push.key_file}"
        )
        yield failed("push certificate", str(error), mend)
        return
    yield _valid("push certificate", certificate, clock, "have its authority renew it, then send SIGHUP")


def _service_identity(listen: ListenSettings, clock: Clock) -> Iterator[Check]:
    """What a listener of the encryption service shows its callers, and whom it believes."""
    name = f"certificate of encryption service at {listen.name}"
    certificate_file, key_file = listen.certificate_file, listen.key_file
    if certificate_file is None or key_file is None:
        yield ok(name, "none: a TLS terminator on this machine has one")
        return
    try:
        read_secret_file(key_file)[:] = b""
        roots = None if listen.client_roots_file is None else load_certificates(listen.client_roots_file)
        server_context(certificate_file, key_file, client_roots=roots)
        certificate = load_certificates(certificate_file)[0]
    except (SettingsError, TlsError) as error:
        mend = getattr(error, "next_step", f"a PEM key of the proxy's user alone: chmod 600 {key_file}")
        yield failed(name, str(error), mend)
        return
    yield _valid(
        name, certificate, clock, "have its authority renew it; the running proxy takes the new file"
    )
    if roots is not None and listen.client_subject is None:
        yield warning(
            name,
            f"whoever has a certificate below {listen.client_roots_file} may connect",
            "name the one client by client_subject, as in cks.kms.<region>.amazonaws.com",
        )


def unheard_dialects(directory: ServiceDirectory, settings: EncryptionServiceSettings) -> Iterator[Check]:
    """Warns of dialects that are on for a tenant while no listener speaks them: nobody can call them."""
    heard = {dialect for listen in settings.listen for dialect in listen.dialects}
    for entry in directory.dialects.values():
        if entry.enabled and entry.dialect not in heard:
            yield warning(
                f"{entry.dialect} of {entry.tenant}",
                "is on, and no listener of the encryption service speaks it",
                f"name {entry.dialect} in an [[encryption_service.listen]], then restart the proxy",
            )


def _token_issuers(directory: ServiceDirectory, settings: OutboundSettings) -> list[Check]:
    """Whether the key sets of those who sign a KACLS's tokens can be fetched from here."""

    async def ask() -> list[Check]:
        async with Outbound(
            outbound_context(settings.ca_file), private_hosts=settings.private_hosts
        ) as outbound:
            return await check_kacls(directory.dialects.values(), outbound)

    try:
        return asyncio.run(ask())
    except TlsError as error:
        return [failed("encryption_service.outbound.ca_file", str(error), error.next_step)]


def _trust(path: Path) -> tuple[ssl.SSLContext | None, Check]:
    """The context that services are verified by. OpenSSL reads the roots, as it does for the engine."""
    try:
        context = ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        detail = f"{path}: no usable root certificate ({error.strerror or 'not PEM'})"
        return None, failed(
            "upstream roots", detail, "give a file of PEM certificates in engine.upstream_ca_file"
        )
    return context, ok("upstream roots", f"{path}: {context.cert_store_stats()['x509_ca']} certificates")


# Tenants and services.


def _tenant(tenant: TenantEntry, clock: Clock) -> Iterator[Check]:
    name = f"tenant {tenant.tenant}"
    try:
        check_root(tenant.root_certificate, now_s=clock.wall_s())
    except CredentialError as error:
        yield failed(name, str(error), f"sealgate tenant update {tenant.tenant} --root FILE")
    else:
        mend = f"ask the tenant for its next root, then `sealgate tenant update {tenant.tenant} --root FILE`"
        yield _valid(f"{name} root", tenant.root_certificate, clock, mend)
    files = tenant.interception_ca
    mend = f"restore {files.key_file} and {files.certificate_file} from backup, or remove and add the tenant"
    try:
        certificate = read_certificate(files.certificate_file)
        matches = read_private_key(files.key_file).public_key() == certificate.public_key()
    except CredentialError as error:
        yield failed(f"{name} interception CA", str(error), mend)
        return
    if not matches:
        yield failed(f"{name} interception CA", "certificate and key do not belong together", mend)
        return
    mend = (
        "remove and add the tenant before it ends, and have clients trust the new one (`sealgate tenant ca`)"
    )
    yield _valid(f"{name} interception CA", certificate, clock, mend)


def _service(service: ServiceEntry, directory: Directory, clock: Clock) -> Iterator[Check]:
    name = f"service {service.owner}"
    if service.profile not in PROFILES:
        known = ", ".join(sorted(PROFILES))
        yield failed(name, f"profile {service.profile!r} does not exist here", f"choose one of: {known}")
    yield from _recipient("service", service, directory, clock)


def _recipient(noun: str, service: Recipient, directory: Directory, clock: Clock) -> Iterator[Check]:
    """Whether keys can be pushed to it."""
    name = f"{noun} {service.owner}"
    renew = f"sealgate {noun} renew {service.owner} --csr FILE; have it signed; sealgate {noun} import-cert"
    if service.certificate is None:
        mend = f"have the tenant's root sign the CSR, then `sealgate {noun} import-cert {service.owner} FILE`"
        yield warning(name, "waits for its certificate; everything is refused until then", mend)
        return
    try:
        verify_certificate(
            service.certificate,
            root=directory.tenants[service.owner.tenant].root_certificate,
            expected=Identity(service.owner.tenant, Role.SERVICE, service.owner.service),
            now_s=clock.wall_s(),
        )
        matches = read_private_key(service.key_file).public_key() == service.certificate.public_key()
    except (CertificateError, CredentialError) as error:
        yield failed(name, str(error), renew)
        return
    if not matches:
        yield failed(name, f"{service.key_file} is not the key of the certificate", renew)
        return
    yield _valid(name, service.certificate, clock, renew)


def _stored_secrets(directory: Directory, state_dir: Path) -> Iterator[Check]:
    """Whether the file keys are here that open the SigV4 secrets, of callers and for signing upstream."""
    callers = [
        entry
        for entry in directory.encryption_service.credentials.values()
        if entry.kind is CredentialKind.SIGV4
    ]
    sealer = SecretSealer(state_dir)
    lost = [entry.id for entry in callers if sealer.open(entry.verifier, entry.id, entry.tenant) is None]
    count = len(callers)
    for service in directory.services.values():
        count += len(service.credentials)
        for access_key, credential in service.credentials.items():
            try:
                credential.open()
            except VaultError:
                lost.append(f"{service.owner} {access_key}")
    if not count:
        return
    if lost:
        yield failed(
            "stored secrets",
            f"{len(lost)} of {count} do not open: {', '.join(sorted(lost)[:5])}",
            f"restore {state_dir / FILE_KEY_DIRECTORY} (mode 0600), or revoke them and issue others",
        )
    else:
        yield ok("stored secrets", f"{count} open by their file keys")


def _stray_keys(state_dir: Path, in_use: set[Path]) -> Iterator[Check]:
    """What an interrupted change may leave."""
    stray = sorted({*(state_dir / "keys").glob("*/*.key"), *(state_dir / "ca").glob("*.key")} - in_use)
    if stray:
        names = ", ".join(str(path) for path in stray[:5])
        yield warning("private keys", f"{len(stray)} file(s) that nothing uses: {names}", "remove them")


def _valid(name: str, certificate: x509.Certificate, clock: Clock, mend: str) -> Check:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return validity(name, begin, end, now=datetime.fromtimestamp(clock.wall_s(), UTC), mend=mend)


# The network.


def _network(listeners: dict[str, Listen], *, is_running: bool) -> Iterator[Check]:
    reasons: list[str] = []
    if is_running and listeners["health"].port:
        reasons, check = _readiness(listeners["health"])
        yield check
    for name, listen in listeners.items():
        if listen.port == 0:
            yield ok(name, f"{listen.host}, any free port")
        elif is_running:
            yield _asked(name, listen, reasons)
        else:
            yield _bindable(name, listen)


def _readiness(health: Listen) -> tuple[list[str], Check]:
    """What the running proxy says of itself: a port that answers may be another program's."""
    client = HTTPConnection(_reachable(health), health.port, timeout=CONNECT_TIMEOUT_S)
    try:
        client.request("GET", "/readyz")
        told = json.loads(client.getresponse().read(_MAX_ANSWER_BYTES))
        reasons = [str(reason) for reason in told["reasons"]]
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        mend = "see who listens there (`ss -ltnp`) and the log of the running proxy"
        detail = f"http://{health}/readyz gives no answer of a proxy ({type(error).__name__})"
        return [], failed("readiness", detail, mend)
    finally:
        client.close()
    if reasons:
        mend = "mend each cause; an address in use: see by whom (`ss -ltnp`). The proxy tries again by itself"
        return reasons, failed("readiness", "; ".join(reasons), mend)
    return [], ok("readiness", "the running proxy serves all that is provisioned")


def _reachable(listen: Listen) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)


def _asked(name: str, listen: Listen, reasons: list[str]) -> Check:
    mend = "see /readyz and the log of the running proxy"
    if against := next((reason for reason in reasons if f"@{listen}:" in reason), None):
        return failed(name, f"not the proxy's: {against}", mend)
    try:
        socket.create_connection((_reachable(listen), listen.port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return failed(name, f"{listen} does not answer: {error.strerror or error}", mend)
    return ok(name, f"{listen} answers")


def _bindable(name: str, listen: Listen) -> Check:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((listen.host, listen.port))
            listener.listen(1)
        except OSError as error:
            mend = (
                "stop what uses it, choose another address, or (ports below 1024) grant CAP_NET_BIND_SERVICE"
            )
            return failed(name, f"{listen} cannot be opened: {error.strerror}", mend)
    return ok(name, f"{listen} is free")


async def _upstreams(services: Iterable[ServiceEntry], context: ssl.SSLContext) -> list[Check]:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_upstream(service, context), name=f"doctor:{service.owner}")
            for service in services
        ]
    return [task.result() for task in tasks]


async def _upstream(service: ServiceEntry, context: ssl.SSLContext) -> Check:
    name, upstream = f"upstream of {service.owner}", service.upstream
    is_tls = upstream.scheme == "https"
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(
                upstream.host, upstream.port, ssl=context if is_tls else None
            )
            writer.close()
    except TimeoutError:
        detail = f"{upstream} does not answer within {CONNECT_TIMEOUT_S:g} s"
        return failed(name, detail, "check the route and the firewall")
    except ssl.SSLCertVerificationError as error:
        mend = "if the service has a private authority, name its roots in engine.upstream_ca_file"
        return failed(name, f"{upstream}: certificate not verified ({error.verify_message})", mend)
    except OSError as error:
        return failed(
            name,
            f"{upstream}: {error.strerror or type(error).__name__}",
            "check the address, DNS, the route and the firewall",
        )
    return ok(
        name, f"{upstream} " + ("answers, certificate verified" if is_tls else "answers (plain, loopback)")
    )
