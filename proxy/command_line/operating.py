"""What every command that works on the directory does: open it, say who works, turn refusals into exit codes.

1. Errors of the directory become errors with a cause, a next step and an exit code, alike for all commands.
2. Who only looks creates and migrates nothing; another user's state is not touched.
3. A request for a certificate can be had again: it is written after the change, and its file tried before it.
"""

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.errors import FormatError
from envelope.keys import NetworkService
from proxy import config
from proxy.tenants import certificates
from proxy.tenants.certificates import CredentialError
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.errors import ChangeRefusedError, DirectoryUnavailableError
from proxy.tenants.model import Listen, TunnelRule
from runtime import cli
from runtime.cli import CommandError, ExitCode
from runtime.clock import SystemClock

type Options = cli.Options[config.Settings]


@dataclass(frozen=True, slots=True)
class Operator:
    options: Options
    settings: config.Settings
    store: DirectoryStore
    actor: str

    @property
    def reserved(self) -> list[Listen]:
        """Addresses of the proxy's own listeners."""
        push, health, portal = self.settings.push, self.settings.health, self.settings.portal
        service = [Listen(part.address, part.port) for part in self.settings.encryption_service.listen]
        if portal is not None:
            service.append(Listen(portal.host, portal.port))
        return [
            part
            for part in (Listen(push.host, push.port), Listen(health.host, health.port), *service)
            if part.port
        ]

    def say(self, data: dict[str, object], text: Callable[[], str] | str) -> None:
        self.options.emit(data, text)


@contextlib.contextmanager
def operating(context: typer.Context, *, looks: bool = False) -> Iterator[Operator]:
    """The directory, opened; what it raises becomes an error with a next step and an exit code.

    Who only *looks* creates and migrates nothing.
    """
    chosen = options_of(context)
    settings = chosen.load()
    url = config.database_url(settings.proxy)
    check_state_dir(settings.proxy.state_dir)
    try:
        state_dir = settings.proxy.state_dir
        with DirectoryStore.open(url, state_dir, clock=SystemClock(), migrate=not looks) as store:
            yield Operator(chosen, settings, store, acting_user())
    except ChangeRefusedError as error:
        raise CommandError(str(error), error.next_step, ExitCode.REFUSED, code=error.code) from error
    except DirectoryUnavailableError as error:
        raise CommandError(str(error), error.next_step, ExitCode.UNAVAILABLE, code="database") from error
    except CredentialError as error:
        next_step = "give a file that exists and holds one certificate, or mend the key file it names"
        raise CommandError(str(error), next_step, ExitCode.REFUSED, code="file") from error


def options_of(context: typer.Context) -> Options:
    chosen = context.obj
    assert isinstance(chosen, cli.Options)  # noqa: S101 - set by the callback before any command
    return chosen


def check_state_dir(state_dir: Path) -> None:
    """Private keys lie there. Files that another user makes could not be read by the proxy."""
    try:
        status = state_dir.stat()
    except OSError:
        return  # made by the first change, as ours
    owner = status.st_uid
    if owner != os.geteuid():
        raise CommandError(
            f"{state_dir} belongs to {user_name(owner)}, not to {user_name(os.geteuid())}",
            f"run the command as that user: sudo -u {user_name(owner)} sealgate ...",
            ExitCode.REFUSED,
            code="user",
        )
    if status.st_mode & 0o077:
        raise CommandError(
            f"{state_dir} has mode {stat.S_IMODE(status.st_mode):04o}; it holds private keys",
            f"chmod 700 {state_dir}",
            ExitCode.REFUSED,
            code="mode",
        )


def acting_user() -> str:
    """Who does it, as far as the system says."""
    user = f"{user_name(os.getuid())} (uid {os.getuid()})"
    behind = os.environ.get("SUDO_USER")
    return f"{user} for {behind[:64]}" if behind and behind.isprintable() else user


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def usage_error(error: Exception, next_step: str) -> CommandError:
    return CommandError(str(error), next_step, ExitCode.USAGE)


def parse_owner(text: str) -> NetworkService:
    try:
        return NetworkService.parse(text)
    except FormatError as error:
        raise usage_error(error, "give tenant/service, as `sealgate list` shows them") from None


def listen_from(text: str | None) -> Listen | None:
    try:
        return None if text is None else Listen.parse(text)
    except FormatError as error:
        raise usage_error(
            error, "give an IP address and a port: 127.0.0.1:3128, 0.0.0.0:443, [::]:443"
        ) from None


def host_rules(patterns: Sequence[str] | None) -> frozenset[str]:
    """Host names and *.domains. CommandError if one is neither."""
    try:
        return frozenset(TunnelRule.parse(pattern).pattern for pattern in patterns or ())
    except FormatError as error:
        raise usage_error(error, "give host names, or *.domain.example for all below it") from None


def check_exclusive(one: str, has_one: bool, other: str, has_other: bool) -> None:
    """CommandError where both options were given."""
    if has_one and has_other:
        raise CommandError(f"{one} and {other} exclude each other", "give one of them", ExitCode.USAGE)


def certificate_from(path: Path) -> x509.Certificate:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return certificates.read_certificate(path)


def not_there(cause: str) -> CommandError:
    return CommandError(cause, "see `sealgate list`", ExitCode.REFUSED, code="not-there")


def check_csr_file(path: Path) -> None:
    """Before a key is made for it: a change whose result cannot be handed over is none."""
    directory = path.absolute().parent
    target = path if path.exists() else directory
    if not directory.is_dir() or path.is_dir() or not os.access(target, os.W_OK):
        raise CommandError(
            f"--csr {path}: this user cannot write that file",
            "name a file in an existing directory that this user may write",
            ExitCode.USAGE,
        )


def write_csr(request: x509.CertificateSigningRequest, path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.fchmod(descriptor, 0o644)  # nothing secret; our umask would keep it from the tenant
            file.write(request.public_bytes(Encoding.PEM))
    except OSError as error:
        raise CommandError(
            f"the key is made, but its request was not written: {path}: {error.strerror}",
            "mend that, then repeat the command: it gives the request again",
            ExitCode.FAILED,
            code="csr-not-written",
        ) from error
