"""`sealgate s3-credential`: what requests to an S3 service are signed with anew.

1. As in proxy/cli.py: the directory is changed whether the proxy runs or not; a running one takes it over.
2. A secret comes from a file or from standard input (`-`), never as an argument; no command shows it again.
   One that is drawn here is printed once, or written to a new file of mode 0600.
"""

import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from envelope.errors import FormatError
from proxy.command_line.operating import Operator, not_there, operating, parse_owner, usage_error
from proxy.encryption_service.credentials import FileKeyError, new_access_key
from proxy.tenants import certificates
from proxy.tenants.certificates import CredentialError
from proxy.tenants.vault_store import add_credential, remove_credential
from proxy.vault.model import MAX_TOKEN_LENGTH, Secrets, UpstreamCredential
from runtime.cli import CommandError, ExitCode

s3_credential_app = typer.Typer(
    no_args_is_help=True, help="Access keys of S3 clients, and what their requests are signed with upstream."
)
STDIN: Final = Path("-")
_COMMAND: Final = "s3-credential"

ServiceName = Annotated[
    str, typer.Argument(metavar="TENANT/SERVICE", help="A network service of profile s3.")
]
AccessKey = Annotated[str, typer.Argument(metavar="ACCESS_KEY", help="The client's access key id.")]


@s3_credential_app.command(
    "add", epilog="Example: sealgate s3-credential add acme/s3 AKIA... --secret-file secret.txt"
)
def add(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    service: ServiceName,
    access_key: Annotated[
        str | None, typer.Argument(metavar="[ACCESS_KEY]", help="The client's; none with --generate.")
    ] = None,
    secret_file: Annotated[
        Path | None, typer.Option("--secret-file", help="The client's secret access key; - reads stdin.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Draw a gateway key: access key and secret for clients.")
    ] = False,
    generated_secret_file: Annotated[
        Path | None,
        typer.Option("--write-secret-file", help="Write the drawn secret to this new file (0600)."),
    ] = None,
    upstream_access_key: Annotated[
        str | None, typer.Option("--upstream-access-key", help="The service's, if it is another one.")
    ] = None,
    upstream_secret_file: Annotated[
        Path | None, typer.Option("--upstream-secret-file", help="Its secret; - reads stdin.")
    ] = None,
    session_token_file: Annotated[
        Path | None, typer.Option("--session-token-file", help="Of temporary upstream credentials (STS).")
    ] = None,
    not_after: Annotated[
        datetime | None, typer.Option("--not-after", formats=["%Y-%m-%d"], help="Its last day (UTC).")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="In place of the one there is for this access key.")
    ] = False,
) -> None:
    """Let a client's requests in, and say what they are signed with upstream."""
    if generate in (access_key is not None, secret_file is not None):
        raise CommandError(
            "give ACCESS_KEY and --secret-file, or --generate alone", "see --help", ExitCode.USAGE
        )
    if generate and upstream_secret_file is None:
        raise CommandError(
            "the service does not know a drawn key",
            "give --upstream-access-key and --upstream-secret-file",
            ExitCode.USAGE,
        )
    if [secret_file, upstream_secret_file, session_token_file].count(STDIN) > 1:
        raise CommandError("standard input holds one secret", "use files for the others", ExitCode.USAGE)
    check_new_file(generated_secret_file, option="--write-secret-file")
    with operating(context) as operator:
        drawn = new_access_key() if generate else None
        name = drawn.id if drawn is not None else access_key or ""
        kept = Secrets(
            client_secret=drawn.secret if drawn is not None else read_secret(secret_file) or "",
            upstream_secret=read_secret(upstream_secret_file),
            session_token=read_secret(session_token_file),
        )
        entry = keep(
            operator,
            service,
            name,
            kept,
            command=_COMMAND,
            upstream_access_key=upstream_access_key,
            not_after=not_after,
            replace=replace,
        )
        if drawn is None:
            tell_kept(operator, service, entry)
            return
        hand_over(
            operator,
            service,
            entry,
            Drawn(secret=drawn.secret, command=_COMMAND, word="secret", label="access key"),
            generated_secret_file,
        )


@s3_credential_app.command("list", epilog="Example: sealgate s3-credential list acme/s3")
def list_(context: typer.Context, service: ServiceName) -> None:
    """The access keys, without their secrets."""
    tell_all(context, service)


@s3_credential_app.command("remove", epilog="Example: sealgate s3-credential remove acme/s3 AKIA...")
def remove(context: typer.Context, service: ServiceName, access_key: AccessKey) -> None:
    """Requests with this access key are refused as soon as the running proxy has read the directory."""
    with operating(context) as operator:
        remove_credential(operator.store, parse_owner(service), access_key, actor=operator.actor)
        operator.say({"changed": True, "removed": access_key}, f"{access_key} removed from {service}")


# ---- for whatever commands keep credentials


@dataclass(frozen=True, slots=True)
class Drawn:
    """A secret that was drawn here, and the words in which its operator is told of it."""

    secret: str = field(repr=False)
    command: str
    """As in `sealgate ...`."""
    word: str
    """What it is, and its name in JSON."""
    label: str
    """What its owner is."""


def keep(
    operator: Operator,
    service: str,
    name: str,
    secrets: Secrets,
    *,
    command: str,
    upstream_access_key: str | None = None,
    not_after: datetime | None,
    replace: bool,
) -> UpstreamCredential:
    """Add it to the vault. *not_after*: its last day. CommandError."""
    end_s = None if not_after is None else not_after.replace(tzinfo=UTC).timestamp() + 24 * 3600
    try:
        return add_credential(
            operator.store,
            parse_owner(service),
            name,
            secrets,
            actor=operator.actor,
            upstream_access_key=upstream_access_key,
            not_after_s=end_s,
            replace=replace,
        )
    except FormatError as error:
        raise usage_error(error, f"see sealgate {command} add --help") from None
    except FileKeyError as error:
        raise CommandError(str(error), "mend the file keys below proxy.state_dir", ExitCode.FAILED) from None


def tell_kept(operator: Operator, service: str, entry: UpstreamCredential) -> None:
    operator.say({"changed": True, "credential": as_json(service, entry)}, line_of(service, entry))


def hand_over(
    operator: Operator, service: str, entry: UpstreamCredential, drawn: Drawn, file: Path | None
) -> None:
    """Its operator gets what was drawn, once: shown, or written to the new *file*. CommandError."""
    name = entry.access_key
    data: dict[str, object] = {"changed": True, "credential": as_json(service, entry)}
    if file is None:
        data[drawn.word] = drawn.secret
        width = max(len(drawn.label), len(drawn.word))
        shown = f"{drawn.label:{width}} {name}\n{drawn.word:{width}} {drawn.secret}"
        operator.say(data, f"{shown}\n  keep it now: nobody can read it again")
        return
    try:
        certificates.write_new_file(file, drawn.secret.encode() + b"\n", mode=0o600)
    except CredentialError as error:
        raise CommandError(
            f"{name} was added, but its {drawn.word} was not written: {error}",
            f"remove it by `sealgate {drawn.command} remove {service} {name}`, then repeat",
            ExitCode.FAILED,
            code="secret-not-written",
        ) from None
    data[f"{drawn.word}_file"] = str(file)
    operator.say(data, f"{drawn.label} {name}; its {drawn.word} is in {file}")


def tell_all(context: typer.Context, service: str) -> None:
    """What the vault has for *service*, without secrets. CommandError."""
    with operating(context, looks=True) as operator:
        entry = operator.store.snapshot().services.get(parse_owner(service))
        if entry is None:
            raise not_there(f"there is no network service {service}")
        found = [entry.credentials[name] for name in sorted(entry.credentials)]
        operator.say(
            {"credentials": [as_json(service, item) for item in found]},
            "\n".join(line_of(service, item) for item in found) or "no credentials",
        )


def read_secret(file: Path | None) -> str | None:
    """The one line in *file*. CommandError, which names the file alone."""
    if file is None:
        return None
    limit = MAX_TOKEN_LENGTH + 2
    try:
        if file == STDIN:
            text = sys.stdin.read(limit)
        else:
            with file.open(encoding="ascii") as source:
                text = source.read(limit)
    except (OSError, UnicodeError) as error:
        raise CommandError(
            f"{file} cannot be read: {type(error).__name__}", "name a file with the secret", ExitCode.USAGE
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def check_new_file(file: Path | None, *, option: str) -> None:
    """CommandError unless *file*, which *option* names, can be written as a new one."""
    if file is not None and (file.exists() or not file.absolute().parent.is_dir()):
        raise CommandError(
            f"{option} {file}: exists, or its directory does not",
            "name a new file in an existing directory",
            ExitCode.USAGE,
        )


def as_json(service: str, entry: UpstreamCredential) -> dict[str, object]:
    return {
        "service": service,
        "access_key": entry.access_key,
        "upstream_access_key": entry.upstream_access_key,
        "created": _time(entry.created_at_s),
        "not_after": None if entry.not_after_s is None else _time(entry.not_after_s),
    }


def line_of(service: str, entry: UpstreamCredential) -> str:
    other = "" if entry.upstream_access_key == entry.access_key else f", upstream {entry.upstream_access_key}"
    end = "" if entry.not_after_s is None else f", until {_time(entry.not_after_s)}"
    return f"{service} {entry.access_key}{other}{end}"


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
