"""`sealgate key`, `sealgate credential`, `sealgate dialect`: provisioning of the encryption service.

1. As in proxy/cli.py: the directory is changed whether the proxy runs or not, doing again what is there
   changes nothing, removing what is not there fails.
2. A secret is printed once, by the command that makes it, to standard output or to a file of mode 0600 that
   does not exist yet. It is never an argument: AWS's own pair is read from a file.
3. A running proxy takes a change over within `proxy.reload_s`; every answer says so (`effective_within_s`).
"""

import ipaddress
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from envelope.certificates import fingerprint
from envelope.errors import FormatError
from envelope.keys import KeyUse, SigningAlgorithm, check_name
from proxy.encryption_service.credentials import read_bearer
from proxy.encryption_service.dialects.xks_store import console_file, new_prefix, uri_path
from proxy.encryption_service.model import (
    CredentialEntry,
    CredentialKind,
    DialectEntry,
    DialectName,
    DialectSettings,
    NamedKey,
    Network,
    Op,
)
from proxy.operating import (
    Operator,
    certificate_from,
    check_csr_file,
    not_there,
    operating,
    parse_owner,
    usage_error,
    write_csr,
)
from proxy.tenants import certificates
from proxy.tenants.certificates import CredentialError, KeyType
from proxy.tenants.recipient_store import certificate_request, import_certificate, renew_key
from proxy.tenants.service_rows import joined, parse_settings
from proxy.tenants.service_store import Grant, Issued, ServiceStore
from runtime.cli import CommandError, ExitCode

_DURATION_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

key_app = typer.Typer(no_args_is_help=True, help="Named keys of the encryption service.")
credential_app = typer.Typer(no_args_is_help=True, help="Credentials of the encryption service's callers.")
dialect_app = typer.Typer(no_args_is_help=True, help="What the encryption service speaks, tenant by tenant.")

KeyName = Annotated[str, typer.Argument(metavar="TENANT/KEY", help="Named key id, immutable.")]
TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Tenant id.")]
Dialect = Annotated[DialectName, typer.Argument(metavar="DIALECT", help="native, xks, transit or kacls.")]
CredentialId = Annotated[
    str, typer.Argument(metavar="ID", help="Credential id, see `sealgate credential list`.")
]
CsrFile = Annotated[
    Path, typer.Option("--csr", metavar="OUT", help="Where to write the certificate request (PEM).")
]
Operations = Annotated[
    list[Op] | None, typer.Option("--operation", help="Allow this operation only; repeatable. Default: all.")
]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        "--secret-file", metavar="OUT", help="Write the secret to this new file, not to the screen."
    ),
]
OnlyTenant = Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="Of this tenant only.")]


# Named keys.


@key_app.command("add", epilog="Example: sealgate key add acme/orders --csr orders.csr")
def key_add(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    name: KeyName,
    csr: CsrFile,
    use: Annotated[KeyUse, typer.Option("--use", help="data: encrypt; sign: sign and verify.")] = KeyUse.DATA,
    algorithm: Annotated[
        SigningAlgorithm | None, typer.Option("--algorithm", help="Of a signing key, as the agent makes it.")
    ] = None,
    operation: Operations = None,
    key_type: Annotated[
        KeyType, typer.Option("--key-type", help="Of the private key made here, which opens envelopes.")
    ] = KeyType.P256,
) -> None:
    """Provision a named key: make its private key here, write the CSR for the tenant's root."""
    with operating(context) as operator:
        owner = parse_owner(name)
        check_csr_file(csr)
        store = ServiceStore(operator.store)
        operations = None if not operation else frozenset(operation)
        known = operator.store.snapshot().encryption_service.keys.get(owner)
        same = known is not None and (known.use, known.algorithm) == (use, algorithm)
        if known is not None and same and operations in {None, known.operations}:
            request = certificate_request(operator.store, owner)
        else:
            known = None
            request = store.add_key(
                owner,
                actor=operator.actor,
                use=use,
                algorithm=algorithm,
                operations=operations,
                key_type=key_type,
            )
        write_csr(request, csr)
        _show_key(operator, _key_of(operator, name), changed=known is None, csr=csr)


@key_app.command("renew", epilog="Example: sealgate key renew acme/orders --csr orders.csr")
def key_renew(
    context: typer.Context,
    name: KeyName,
    csr: CsrFile,
    key_type: Annotated[KeyType, typer.Option("--key-type", help="Of the new private key.")] = KeyType.P256,
) -> None:
    """Make a new private key and its CSR; the present certificate serves until the new one is imported."""
    with operating(context) as operator:
        check_csr_file(csr)
        key = _key_of(operator, name)
        request = renew_key(operator.store, key.owner, actor=operator.actor, key_type=key_type)
        write_csr(request, csr)
        _show_key(operator, _key_of(operator, name), changed=True, csr=csr)


@key_app.command("import-cert", epilog="Example: sealgate key import-cert acme/orders orders.pem")
def key_import(
    context: typer.Context,
    name: KeyName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The certificate (PEM or DER).")],
) -> None:
    """Take the certificate that the tenant's root made of the CSR."""
    with operating(context) as operator:
        certificate = certificate_from(file)
        key, before = _key_of(operator, name), operator.store.revision()
        import_certificate(operator.store, key.owner, certificate, actor=operator.actor)
        _show_key(operator, _key_of(operator, name), changed=operator.store.revision() != before)


@key_app.command("list", epilog="Example: sealgate key list --tenant acme --json")
def key_list(context: typer.Context, tenant: OnlyTenant = None) -> None:
    """The named keys."""
    with operating(context, looks=True) as operator:
        found = [
            key
            for key in operator.store.snapshot().encryption_service.keys.values()
            if tenant is None or key.tenant == tenant
        ]
        found.sort(key=lambda key: key.owner)
        operator.say(
            {"keys": [_key_json(key) for key in found]},
            lambda: "\n".join(line for key in found for line in _key_lines(key)) or "no named keys",
        )


@key_app.command("block", epilog="Example: sealgate key block acme/orders")
def key_block(context: typer.Context, name: KeyName) -> None:
    """Refuse every use of the key; keys go on being pushed, other keys are not touched."""
    _set_blocked(context, name, blocked=True)


@key_app.command("unblock", epilog="Example: sealgate key unblock acme/orders")
def key_unblock(context: typer.Context, name: KeyName) -> None:
    """Let the key be used again."""
    _set_blocked(context, name, blocked=False)


@key_app.command("remove", epilog="Example: sealgate key remove acme/orders")
def key_remove(context: typer.Context, name: KeyName) -> None:
    """Remove a named key from this proxy. What it has encrypted opens again when it is provisioned again."""
    with operating(context) as operator:
        owner = parse_owner(name)
        ServiceStore(operator.store).remove_key(owner, actor=operator.actor)
        _say(operator, {"changed": True, "removed": str(owner)}, f"key {owner} removed")


def _set_blocked(context: typer.Context, name: str, *, blocked: bool) -> None:
    with operating(context) as operator:
        before = operator.store.revision()
        key = ServiceStore(operator.store).set_blocked(
            parse_owner(name), blocked=blocked, actor=operator.actor
        )
        _show_key(operator, key, changed=operator.store.revision() != before)


# Credentials.


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
        issued = ServiceStore(operator.store).issue(grant, actor=operator.actor, access_key=pair, token=token)
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
        issued = ServiceStore(operator.store).rotate(
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
        entry = ServiceStore(operator.store).revoke(credential, actor=operator.actor)
        _say(
            operator,
            {"changed": True, "revoked": entry.id, "tenant": entry.tenant},
            f"credential {entry.id} ({entry.label}) revoked",
        )


@credential_app.command("rotate-file-key", epilog="Example: sealgate credential rotate-file-key")
def credential_rotate_file_key(context: typer.Context) -> None:
    """Seal the stored secrets of SigV4 credentials by a new file key, and remove the old one."""
    with operating(context) as operator:
        count = ServiceStore(operator.store).rotate_file_key(actor=operator.actor)
        _say(operator, {"changed": True, "resealed": count}, f"{count} secret(s) sealed by a new file key")


# Dialects.


@dialect_app.command("enable", epilog="Example: sealgate dialect enable acme transit")
def dialect_enable(context: typer.Context, tenant: TenantName, dialect: Dialect) -> None:
    """Switch a dialect on for a tenant."""
    _set_dialect(context, tenant, dialect, enabled=True)


@dialect_app.command("disable", epilog="Example: sealgate dialect disable acme transit")
def dialect_disable(context: typer.Context, tenant: TenantName, dialect: Dialect) -> None:
    """Switch it off; settings and credentials stay."""
    _set_dialect(context, tenant, dialect, enabled=False)


@dialect_app.command("set", epilog="Example: sealgate dialect set acme xks --settings xks.json")
def dialect_set(
    context: typer.Context,
    tenant: TenantName,
    dialect: Dialect,
    settings: Annotated[
        Path, typer.Option("--settings", metavar="FILE", help="JSON; the dialect's page in docs/ says what.")
    ],
) -> None:
    """Replace a dialect's settings; a dialect that was not there is switched on."""
    _set_dialect(context, tenant, dialect, settings=settings)


@dialect_app.command("new-prefix", epilog="Example: sealgate dialect new-prefix acme")
def dialect_new_prefix(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it begins with; may be empty.")] = "",
) -> None:
    """Draw an unguessable prefix for a key store of AWS KMS; nothing is changed."""
    with operating(context, looks=True) as operator:
        try:
            prefix = new_prefix(name)
        except ValueError as error:
            raise usage_error(error, "give segments of A-Z a-z 0-9 _ -, or nothing") from None
        operator.say({"prefix": prefix, "uri_path": uri_path(prefix)}, prefix)


@dialect_app.command("list", epilog="Example: sealgate dialect list --json")
def dialect_list(context: typer.Context, tenant: OnlyTenant = None) -> None:
    """Dialects, tenant by tenant, with their settings."""
    with operating(context, looks=True) as operator:
        found = [
            entry
            for entry in operator.store.snapshot().encryption_service.dialects.values()
            if tenant is None or entry.tenant == tenant
        ]
        found.sort(key=lambda entry: (entry.tenant, entry.dialect))
        operator.say(
            {"dialects": [_dialect_json(entry) for entry in found]},
            lambda: "\n".join(_dialect_line(entry) for entry in found) or "no dialects",
        )


def _set_dialect(
    context: typer.Context,
    tenant: str,
    dialect: DialectName,
    *,
    enabled: bool | None = None,
    settings: Path | None = None,
) -> None:
    with operating(context) as operator:
        before = operator.store.revision()
        entry = ServiceStore(operator.store).set_dialect(
            check_name("tenant", tenant),
            dialect,
            actor=operator.actor,
            enabled=enabled,
            settings=None if settings is None else _settings(dialect, settings),
        )
        changed = operator.store.revision() != before
        _say(operator, {"changed": changed, "dialect": _dialect_json(entry)}, _dialect_line(entry))


# Arguments.


def _key_of(operator: Operator, name: str) -> NamedKey:
    key = operator.store.snapshot().encryption_service.keys.get(parse_owner(name))
    if key is None:
        raise not_there(f"there is no key {name}")
    return key


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


def _settings(dialect: DialectName, path: Path) -> DialectSettings:
    try:
        return parse_settings(dialect, path.read_bytes())
    except msgspec.MsgspecError as error:
        raise CommandError(
            f"{path}: not the settings of {dialect}: {error}",
            "see the dialect's page in docs/",
            ExitCode.USAGE,
        ) from None


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


# Results.


def _say(operator: Operator, data: dict[str, object], text: Callable[[], str] | str) -> None:
    """With the revision, and how soon a running proxy heeds it (rule 3)."""
    within_s = operator.settings.proxy.reload_s
    facts = {"revision": operator.store.revision(), "effective_within_s": within_s}
    written = text if isinstance(text, str) else text()
    operator.say({**data, **facts}, f"{written}\na running proxy heeds it within {within_s:g} s")


def _show_key(operator: Operator, key: NamedKey, *, changed: bool, csr: Path | None = None) -> None:
    data: dict[str, object] = {"changed": changed, "key": _key_json(key)}
    lines = ([] if changed else ["unchanged"]) + _key_lines(key)
    if csr is not None:
        data["csr_file"] = str(csr)
        lines.append(f"  request written to {csr}; have the tenant's root sign it, then")
        lines.append(f"  sealgate key import-cert {key.owner} FILE")
    _say(operator, data, "\n".join(lines))


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
    _say(operator, data, "\n".join(lines))


def _secret_document(issued: Issued) -> dict[str, str]:
    if issued.entry.kind is CredentialKind.BEARER:
        return {"token": issued.secret}
    return {"access_key_id": issued.entry.id, "raw_secret_access_key": issued.secret}


def _secret_file_content(issued: Issued) -> bytes:
    """What a secret file holds: for XKS the file that the AWS console imports."""
    if issued.entry.kind is CredentialKind.BEARER:
        return json.dumps({"token": issued.secret}, indent=2).encode() + b"\n"
    return console_file(issued.entry.endpoint or "", issued.entry.id, issued.secret)


def _key_json(key: NamedKey) -> dict[str, object]:
    certificate = key.certificate
    return {
        "key": str(key.owner),
        "state": "waits for its certificate" if certificate is None else "provisioned",
        "use": key.use.value,
        "algorithm": None if key.algorithm is None else key.algorithm.value,
        "operations": sorted(key.operations),
        "blocked": key.blocked,
        "certificate_sha256": None if certificate is None else fingerprint(certificate).hex(),
        "not_after": None if certificate is None else certificate.not_valid_after_utc.isoformat(),
    }


def _key_lines(key: NamedKey) -> list[str]:
    kind = key.use.value if key.algorithm is None else f"{key.use.value} {key.algorithm.value}"
    lines = [f"key {key.owner} ({kind}: {joined(key.operations)}){', BLOCKED' if key.blocked else ''}"]
    if key.certificate is None:
        lines.append("  waits for its certificate: refuses everything")
    else:
        end = key.certificate.not_valid_after_utc.date()
        lines.append(f"  certificate sha256 {fingerprint(key.certificate).hex()}, until {end}")
    return lines


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


def _dialect_json(entry: DialectEntry) -> dict[str, object]:
    return {
        "tenant": entry.tenant,
        "dialect": entry.dialect.value,
        "enabled": entry.enabled,
        "settings": msgspec.to_builtins(entry.settings),
    }


def _dialect_line(entry: DialectEntry) -> str:
    state = "on" if entry.enabled else "off"
    return f"{entry.tenant} {entry.dialect}: {state}, {msgspec.json.encode(entry.settings).decode()}"


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
