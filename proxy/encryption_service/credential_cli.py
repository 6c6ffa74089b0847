"""`sealgate credential`: credentials of the encryption service's callers.

A secret is printed once, by the command that makes it, to standard output or to a file of mode 0600 that does
not exist yet. It is never an argument: AWS's own pair is read from a file.
"""

import ipaddress
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from envelope.errors import FormatError
from envelope.keys import check_name
from proxy.command_line.operating import Operator, operating, usage_error
from proxy.encryption_service.credentials import read_bearer
from proxy.encryption_service.dialects.xks_store import console_file
from proxy.encryption_service.model import CredentialEntry, CredentialKind, Network, Op
from proxy.encryption_service.provisioning import Dialect, OnlyTenant, Operations, TenantName, say_effective
from proxy.tenants import certificates
from proxy.tenants.certificates import CredentialError
from proxy.tenants.credential_store import (
    Grant,
    Issued,
    issue_credential,
    revoke_credential,
    rotate_credential,
    rotate_file_key,
)
from proxy.tenants.service_rows import joined
from runtime.cli import CommandError, ExitCode

credential_app = typer.Typer(no_args_is_help=True, help="Credentials of the encryption service's callers.")


_DURATION_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


CredentialId = Annotated[
    str, typer.Argument(metavar="ID", help="Credential id, see `sealgate credential list`.")
]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        "--secret-file", metavar="OUT", help="Write the secret to this new file, not to the screen."
    ),
]


@credential_app.command(
    "issue",
    epilog="Example: sealgate credential issue acme transit --label sops --key orders --valid-for 90d",
)
def credential_issue(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    tenant: TenantName,
    dialect: Dialect,
    label: Annotated[str, typer.Option("--label", help="Who gets it; stands in the audit records.")],
    key: Annotated[
        list[str] | None, typer.Option("--key", metavar="NAME", help="For this key only; repeatable.")
    ] = None,
    operation: Operations = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="The XKS prefix (required), or one transit mount.")
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option("--network", metavar="CIDR", help="Only from here; repeatable.")
    ] = None,
    valid_for: Annotated[
        str | None, typer.Option("--valid-for", metavar="TIME", help="90d, 12h, 30m; default: until revoked.")
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option("--requests-per-s", help="Its own rate limit.")
    ] = None,
    access_key_file: Annotated[
        Path | None,
        typer.Option(
            "--access-key-file",
            metavar="FILE",
            help='XKS: take this pair, {"AccessKeyId", "RawSecretAccessKey"}, in place of a new one.',
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="Not xks: take the token that another proxy has issued, as --secret-file wrote it there.",
        ),
    ] = None,
    secret_file: SecretFile = None,
) -> None:
    """Issue a credential. Its secret is shown now and never again."""
    with operating(context) as operator:
        _check_secret_file(secret_file)
        grant = Grant(
            tenant=check_name("tenant", tenant),
            dialect=dialect,
            label=label,
            keys=None if not key else frozenset(key),
            operations=frozenset(Op) if not operation else frozenset(operation),
            endpoint=endpoint,
            networks=tuple(_network(text) for text in network or ()),
            not_after_s=None if valid_for is None else operator.store.now_ms() / 1000 + _seconds(valid_for),
            requests_per_s=requests_per_s,
        )
        pair = None if access_key_file is None else _access_key(access_key_file)
        token = None if token_file is None else _token(token_file)
        issued = issue_credential(operator.store, grant, actor=operator.actor, access_key=pair, token=token)
        _show_issued(operator, issued, secret_file, is_known=token is not None)


@credential_app.command("list", epilog="Example: sealgate credential list --tenant acme")
def credential_list(context: typer.Context, tenant: OnlyTenant = None) -> None:
    """The credentials, without their secrets."""
    with operating(context, looks=True) as operator:
        now_s = operator.store.now_ms() / 1000
        found = [
            entry
            for entry in operator.store.snapshot().encryption_service.credentials.values()
            if tenant is None or entry.tenant == tenant
        ]
        found.sort(key=lambda entry: (entry.tenant, entry.dialect, entry.label, entry.created_at_s, entry.id))
        operator.say(
            {"credentials": [_credential_json(entry, now_s) for entry in found]},
            lambda: (
                "\n".join(line for entry in found for line in _credential_lines(entry, now_s))
                or "no credentials"
            ),
        )


@credential_app.command("rotate", epilog="Example: sealgate credential rotate ID --overlap 24h")
def credential_rotate(
    context: typer.Context,
    credential: CredentialId,
    overlap: Annotated[
        str | None,
        typer.Option("--overlap", metavar="TIME", help="The old one ends then; default: revoke it."),
    ] = None,
    valid_for: Annotated[
        str | None, typer.Option("--valid-for", metavar="TIME", help="Default: until the old one's end.")
    ] = None,
    secret_file: SecretFile = None,
) -> None:
    """Issue a successor with the same rights; both are live until the old one ends or is revoked."""
    with operating(context) as operator:
        _check_secret_file(secret_file)
        now_s = operator.store.now_ms() / 1000
        ends_s = None if overlap is None else now_s + _seconds(overlap)
        issued = rotate_credential(
            operator.store,
            credential,
            actor=operator.actor,
            old_ends_s=ends_s,
            ends_s=None if valid_for is None else now_s + _seconds(valid_for),
        )
        _show_issued(operator, issued, secret_file)


@credential_app.command("revoke", epilog="Example: sealgate credential revoke ID")
def credential_revoke(context: typer.Context, credential: CredentialId) -> None:
    """Let nobody in by this credential any more."""
    with operating(context) as operator:
        entry = revoke_credential(operator.store, credential, actor=operator.actor)
        say_effective(
            operator,
            {"changed": True, "revoked": entry.id, "tenant": entry.tenant},
            f"credential {entry.id} ({entry.label}) revoked",
        )


@credential_app.command("rotate-file-key", epilog="Example: sealgate credential rotate-file-key")
def credential_rotate_file_key(context: typer.Context) -> None:
    """Seal the stored secrets of SigV4 credentials by a new file key, and remove the old one."""
    with operating(context) as operator:
        count = rotate_file_key(operator.store, actor=operator.actor)
        say_effective(
            operator, {"changed": True, "resealed": count}, f"{count} secret(s) sealed by a new file key"
        )


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise usage_error(error, "give a network, as 10.1.0.0/16 or 2001:db8::/32") from None


def _seconds(text: str) -> float:
    unit = _DURATION_S.get(text[-1:], 0)
    number = text[:-1]
    if not unit or not number.isascii() or not number.isdecimal() or not 0 < int(number) <= 100_000:
        raise CommandError(f"not a time: {text!r}", "give a number and s, m, h or d: 90d", ExitCode.USAGE)
    return int(number) * unit


def _access_key(path: Path) -> tuple[str, str]:
    """From AWS's form, `{"AccessKeyId": ..., "RawSecretAccessKey": ...}`; errors do not quote the file."""
    try:
        document = json.loads(path.read_bytes())
        pair = document.get("XksProxyAuthenticationCredential", document)
        name, secret = pair["AccessKeyId"], pair["RawSecretAccessKey"]
        if isinstance(name, str) and isinstance(secret, str):
            return name, secret
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    raise CommandError(
        f"{path}: not a pair of AccessKeyId and RawSecretAccessKey",
        "give the JSON of the two",
        ExitCode.USAGE,
    )


def _token(path: Path) -> str:
    """From what `--secret-file` writes, `{"token": ...}`; errors do not quote the file."""
    try:
        token = json.loads(path.read_bytes())["token"]
        if isinstance(token, str):
            return read_bearer(token).token
    except (OSError, ValueError, KeyError, TypeError, FormatError):
        pass
    raise CommandError(
        f"{path}: no token of a proxy's",
        "give the file that `sealgate credential issue --secret-file` wrote at the other proxy",
        ExitCode.USAGE,
    )


def _check_secret_file(path: Path | None) -> None:
    if path is not None and (path.exists() or not path.absolute().parent.is_dir()):
        raise CommandError(
            f"--secret-file {path}: exists, or its directory does not",
            "name a new file in an existing directory",
            ExitCode.USAGE,
        )


def _show_issued(
    operator: Operator, issued: Issued, secret_file: Path | None, *, is_known: bool = False
) -> None:
    """*is_known*: its secret was brought, so it is not shown again."""
    entry = issued.entry
    document = _secret_document(issued)
    data: dict[str, object] = {
        "changed": True,
        "credential": _credential_json(entry, operator.store.now_ms() / 1000),
    }
    lines = _credential_lines(entry, operator.store.now_ms() / 1000)
    if is_known and secret_file is None:
        lines.append("  its token is the one that was given")
    elif secret_file is None:
        data |= document
        lines += [f"  {name} {value}" for name, value in document.items()]
        lines.append("  keep it now: nobody can read it again")
    else:
        try:
            certificates.write_new_file(secret_file, _secret_file_content(issued), mode=0o600)
        except CredentialError as error:
            raise CommandError(
                f"the credential {entry.id} is issued, but its secret was not written: {error}",
                f"`sealgate credential revoke {entry.id}`, then issue it again",
                ExitCode.FAILED,
                code="secret-not-written",
            ) from None
        data["secret_file"] = str(secret_file)
        lines.append(f"  its secret is in {secret_file}")
    say_effective(operator, data, "\n".join(lines))


def _secret_document(issued: Issued) -> dict[str, str]:
    if issued.entry.kind is CredentialKind.BEARER:
        return {"token": issued.secret}
    return {"access_key_id": issued.entry.id, "raw_secret_access_key": issued.secret}


def _secret_file_content(issued: Issued) -> bytes:
    """What a secret file holds: for XKS the file that the AWS console imports."""
    if issued.entry.kind is CredentialKind.BEARER:
        return json.dumps({"token": issued.secret}, indent=2).encode() + b"\n"
    return console_file(issued.entry.endpoint or "", issued.entry.id, issued.secret)


def _credential_json(entry: CredentialEntry, now_s: float) -> dict[str, object]:
    return {
        "id": entry.id,
        "tenant": entry.tenant,
        "dialect": entry.dialect.value,
        "kind": entry.kind.value,
        "label": entry.label,
        "keys": None if entry.keys is None else sorted(entry.keys),
        "operations": sorted(entry.operations),
        "endpoint": entry.endpoint,
        "networks": [str(network) for network in entry.networks],
        "not_after": None if entry.not_after_s is None else _time(entry.not_after_s),
        "ended": entry.not_after_s is not None and entry.not_after_s <= now_s,
        "requests_per_s": entry.requests_per_s,
        "replaces": entry.replaces,
        "created": _time(entry.created_at_s),
    }


def _credential_lines(entry: CredentialEntry, now_s: float) -> list[str]:
    place = "" if entry.endpoint is None else f" at {entry.endpoint}"
    lines = [f"credential {entry.id} ({entry.label}): {entry.tenant}, {entry.dialect}{place}"]
    keys = "all keys" if entry.keys is None else f"keys {joined(entry.keys)}"
    lines.append(f"  {keys}; {joined(entry.operations)}")
    if entry.networks:
        lines.append(f"  from {', '.join(str(network) for network in entry.networks)}")
    if entry.not_after_s is not None:
        verb = "ended" if entry.not_after_s <= now_s else "ends"
        lines.append(f"  {verb} {_time(entry.not_after_s)}")
    if entry.replaces is not None:
        lines.append(f"  takes over from {entry.replaces}")
    return lines


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
