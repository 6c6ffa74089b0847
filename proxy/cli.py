"""`sealgate`: the commands of the proxy's operator.

1. Provisioning goes to the directory database, whether the proxy runs or not; the running one takes a
   change over within `proxy.reload_s`. The database's history is the record of who changed what; the proxy
   copies it to its audit log before it acts on it (the log has one writer).
2. Adding again what is there as it is succeeds and changes nothing. Removing what is not there fails: a typo
   should not look like success.
3. No secret is an argument or a result; private keys are made here and stay below `proxy.state_dir`.
4. Exit codes are those of runtime/cli.py: 0 done, 1 failed, 2 usage, 3 refused by a rule, 4 unavailable now.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from cryptography import x509

from envelope.certificates import fingerprint
from envelope.errors import FormatError
from envelope.inspect import Description, Kind, describe
from envelope.keys import NetworkService, check_name
from proxy import config, refusals
from proxy.encryption_service.cli import credential_app, dialect_app, key_app
from proxy.operating import (
    Operator,
    certificate_from,
    check_csr_file,
    check_state_dir,
    not_there,
    operating,
    options_of,
    parse_owner,
    usage_error,
    write_csr,
)
from proxy.profile_options import edited
from proxy.profiles import PROFILES, UnknownProfileError, profile_named
from proxy.refusals import Refusal
from proxy.tenants import certificates
from proxy.tenants.certificates import KeyType
from proxy.tenants.model import (
    ANY_NAME,
    Directory,
    LegacyPolicy,
    Listen,
    ServiceEntry,
    TenantEntry,
    TunnelRule,
    Upstream,
)
from proxy.tenants.network_service_store import add_service, remove_service, update_service
from proxy.tenants.recipient_store import certificate_request, import_certificate, renew_key
from proxy.tenants.tenant_store import add_tenant, remove_tenant, update_tenant
from proxy.users.cli import tenant_access, user_app
from proxy.vault.azure_cli import azure_credential_app
from proxy.vault.cli import s3_credential_app
from runtime import cli
from runtime import doctor as report
from runtime.audit_command import add_audit
from runtime.cli import CommandError, ExitCode
from runtime.clock import SystemClock

DEFAULT_CONFIG: Final = Path("/etc/sealgate/sealgate.toml")
CONFIG_VARIABLE: Final = "SEALGATE_CONFIG"
_INSPECTED_BYTES: Final = 1 << 20
_TAIL_BYTES: Final = 16

program = cli.make_app("sealgate", "The encrypting proxy whose keys stay with the enterprise.")
tenant_app = typer.Typer(no_args_is_help=True, help="Tenants: enterprises whose traffic this proxy seals.")
service_app = typer.Typer(no_args_is_help=True, help="Network services: a tenant's cloud services.")
profile_app = typer.Typer(
    no_args_is_help=True, help="Profiles: what becomes of a cloud service's operations."
)
program.add_typer(tenant_app, name="tenant")
program.add_typer(service_app, name="service")
program.add_typer(profile_app, name="profile")
program.add_typer(key_app, name="key")
program.add_typer(credential_app, name="credential")
program.add_typer(dialect_app, name="dialect")
program.add_typer(user_app, name="user")
program.add_typer(s3_credential_app, name="s3-credential")
program.add_typer(azure_credential_app, name="azure-credential")


cli.add_options(
    program,
    default_config=DEFAULT_CONFIG,
    config_variable=CONFIG_VARIABLE,
    read=config.load,
    check=config.unusable_files,
)


def _audit_file(settings: config.Settings) -> Path:
    return settings.proxy.audit_file


def _worker_audit_files(settings: config.Settings) -> list[Path]:
    return settings.proxy.audit_files()[1:]


add_audit(program, audit_file=_audit_file, more_files=_worker_audit_files)


def main() -> NoReturn:
    cli.run(program)


# Tenants.

TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Tenant id: [a-z0-9-], immutable.")]
ServiceName = Annotated[str, typer.Argument(metavar="TENANT/SERVICE", help="Network service id, immutable.")]
RootFile = Annotated[Path, typer.Option("--root", help="The tenant's self-signed root certificate (PEM).")]
ForwardListen = Annotated[
    str | None, typer.Option("--forward-listen", metavar="IP:PORT", help="Where its forward proxy listens.")
]
TunnelHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--tunnel-host", metavar="HOST", help="Host (or *.domain) passed through unread; repeatable."
    ),
]
SignerFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--signer", metavar="FILE", help="Pin an agent's signing certificate: believe no other; repeatable."
    ),
]


@tenant_app.command(
    "add",
    epilog="Example: sealgate tenant add acme --root acme-root.pem --forward-listen 0.0.0.0:3128",
)
def tenant_add(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    name: TenantName,
    root: RootFile,
    forward_listen: ForwardListen = None,
    tunnel_host: TunnelHosts = None,
    signer: SignerFiles = None,
) -> None:
    """Provision a tenant; makes its interception CA."""
    with operating(context) as operator:
        certificate, signers = certificate_from(root), _certificates(signer)
        listen, rules = _listen(forward_listen), _rules(tunnel_host)
        known = operator.store.snapshot().tenants.get(check_name("tenant", name))
        wanted = (certificate, listen, rules, set(signers))
        if known is not None and wanted == (
            known.root_certificate,
            known.forward_listen,
            known.tunnel_hosts,
            set(known.signers),
        ):
            show(operator, changed=False, tenant=known)
            return
        entry = add_tenant(
            operator.store,
            name,
            certificate,
            actor=operator.actor,
            forward_listen=listen,
            tunnel_hosts=rules,
            signers=signers,
            reserved=operator.reserved,
        )
        show(operator, changed=True, tenant=entry)


@tenant_app.command(
    "update",
    epilog="Example: sealgate tenant update acme --tunnel-host sso.example --tunnel-host '*.time.example'",
)
def tenant_update(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    name: TenantName,
    root: Annotated[
        Path | None, typer.Option("--root", help="A new root; voids what it has not signed.")
    ] = None,
    forward_listen: ForwardListen = None,
    no_forward: Annotated[bool, typer.Option("--no-forward", help="No forward proxy any more.")] = False,
    tunnel_host: TunnelHosts = None,
    no_tunnel_hosts: Annotated[bool, typer.Option("--no-tunnel-hosts", help="Tunnel no host.")] = False,
    signer: SignerFiles = None,
    no_signers: Annotated[bool, typer.Option("--no-signers", help="Pin no signing certificate.")] = False,
) -> None:
    """Replace what is given of a tenant; lists are replaced whole."""
    with operating(context) as operator:
        changes: dict[str, object] = {}
        if forward_listen is not None or no_forward:
            _exclusive("--forward-listen", forward_listen is not None, "--no-forward", no_forward)
            changes["forward_listen"] = _listen(forward_listen)
        if tunnel_host is not None or no_tunnel_hosts:
            _exclusive("--tunnel-host", tunnel_host is not None, "--no-tunnel-hosts", no_tunnel_hosts)
            changes["tunnel_hosts"] = _rules(tunnel_host)
        if signer is not None or no_signers:
            _exclusive("--signer", signer is not None, "--no-signers", no_signers)
            changes["signers"] = _certificates(signer)
        if root is not None:
            changes["root"] = certificate_from(root)
        if not changes:
            raise CommandError("nothing to change", "see sealgate tenant update --help", ExitCode.USAGE)
        entry = update_tenant(
            operator.store,
            name,
            actor=operator.actor,
            reserved=operator.reserved,
            **changes,  # type: ignore[arg-type]
        )
        show(operator, changed=True, tenant=entry)


@tenant_app.command("remove", epilog="Example: sealgate tenant remove acme")
def tenant_remove(context: typer.Context, name: TenantName) -> None:
    """Remove a tenant that has no network services, with its interception CA."""
    with operating(context) as operator:
        remove_tenant(operator.store, name, actor=operator.actor)
        operator.say({"changed": True, "removed": name}, f"tenant {name} removed")


@tenant_app.command("ca", epilog="Example: sealgate tenant ca acme > acme-interception-ca.pem")
def tenant_ca(context: typer.Context, name: TenantName) -> None:
    """Print the interception CA's certificate (PEM), for the tenant's clients to trust."""
    with operating(context, looks=True) as operator:
        entry = operator.store.snapshot().tenants.get(name)
        if entry is None:
            raise not_there(f"there is no tenant {name}")
        certificate = certificates.read_certificate(entry.interception_ca.certificate_file)
        pem = certificates.certificate_pem(certificate).decode()
        operator.say(
            {"tenant": name, "certificate": pem, "not_after": certificate.not_valid_after_utc.isoformat()},
            pem.rstrip(),
        )


tenant_app.command(
    "access",
    epilog="Example: sealgate tenant access acme --require credentials --network 10.0.0.0/8 --proxy p:3128",
)(tenant_access)


# Network services.

UpstreamOption = Annotated[
    str, typer.Option("--upstream", metavar="URL", help="https://host[:port] of the service.")
]
CsrFile = Annotated[
    Path, typer.Option("--csr", metavar="OUT", help="Where to write the certificate request (PEM).")
]
ProfileOption = Annotated[str, typer.Option("--profile", help="See `sealgate profile list`.")]
ReverseListen = Annotated[
    str | None, typer.Option("--reverse-listen", metavar="IP:PORT", help="Serve it here in reverse mode.")
]
ReverseNames = Annotated[
    list[str] | None,
    typer.Option(
        "--reverse-name",
        metavar="HOST",
        help="In reverse mode by this name (or *.domain) and no other one; repeatable.",
    ),
]
LegacyOption = Annotated[
    LegacyPolicy, typer.Option("--legacy", help="Stored bodies that are not sealed: refuse, or let pass.")
]
OptionChanges = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME[:KEY]=VALUE",
        help="An option of the profile, see `sealgate profile show`; repeatable. An empty value unsets.",
    ),
]
KeyTypeOption = Annotated[KeyType, typer.Option("--key-type", help="Of the private key made here.")]


@service_app.command(
    "add",
    epilog="Example: sealgate service add acme/drive --upstream https://drive.example.com --csr drive.csr",
)
def service_add(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    service: ServiceName,
    upstream: UpstreamOption,
    csr: CsrFile,
    profile: ProfileOption = "generic",
    reverse_listen: ReverseListen = None,
    legacy: LegacyOption = LegacyPolicy.STRICT,
    key_type: KeyTypeOption = KeyType.P256,
    option: OptionChanges = None,
    reverse_name: ReverseNames = None,
) -> None:
    """Provision a network service: make its private key here, write the CSR for the tenant's root."""
    with operating(context) as operator:
        owner, address, listen = parse_owner(service), _upstream(upstream), _listen(reverse_listen)
        options, names = _profile_options(_check_profile(profile), {}, option), _rules(reverse_name)
        check_csr_file(csr)
        known = operator.store.snapshot().services.get(owner)
        if known is not None and (
            known.upstream,
            known.profile,
            known.legacy,
            known.reverse_listen,
            known.profile_options,
            known.reverse_names,
        ) == (address, profile, legacy, listen, options, names):
            request = certificate_request(operator.store, owner)
        else:
            known = None
            request = add_service(
                operator.store,
                owner,
                address,
                actor=operator.actor,
                profile=profile,
                legacy=legacy,
                reverse_listen=listen,
                key_type=key_type,
                reserved=operator.reserved,
                profile_options=options,
                reverse_names=names,
            )
        write_csr(request, csr)
        show(operator, changed=known is None, service=operator.store.snapshot().services[owner], csr=csr)


@service_app.command("update", epilog="Example: sealgate service update acme/drive --legacy strict")
def service_update(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    service: ServiceName,
    upstream: Annotated[str | None, typer.Option("--upstream", metavar="URL", help="A new address.")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="See `sealgate profile list`.")] = None,
    legacy: Annotated[LegacyPolicy | None, typer.Option("--legacy", help="strict or migrate.")] = None,
    reverse_listen: ReverseListen = None,
    no_reverse: Annotated[bool, typer.Option("--no-reverse", help="Not in reverse mode any more.")] = False,
    reverse_name: ReverseNames = None,
    any_reverse_name: Annotated[
        bool,
        typer.Option("--any-reverse-name", help="By whatever name in reverse mode."),
    ] = False,
    own_reverse_names: Annotated[
        bool,
        typer.Option(
            "--own-reverse-names", help="As at first: by the names of the service and of the listener."
        ),
    ] = False,
    option: OptionChanges = None,
) -> None:
    """Replace what is given of a network service; keys and certificate stay."""
    with operating(context) as operator:
        owner = parse_owner(service)
        changes: dict[str, object] = {}
        if upstream is not None:
            changes["upstream"] = _upstream(upstream)
        if profile is not None:
            changes["profile"] = _check_profile(profile)
        if legacy is not None:
            changes["legacy"] = legacy
        if reverse_listen is not None or no_reverse:
            _exclusive("--reverse-listen", reverse_listen is not None, "--no-reverse", no_reverse)
            changes["reverse_listen"] = _listen(reverse_listen)
        if reverse_name is not None or any_reverse_name or own_reverse_names:
            _exclusive("--reverse-name", reverse_name is not None, "--any-reverse-name", any_reverse_name)
            _exclusive("--reverse-name", reverse_name is not None, "--own-reverse-names", own_reverse_names)
            _exclusive("--any-reverse-name", any_reverse_name, "--own-reverse-names", own_reverse_names)
            changes["reverse_names"] = {ANY_NAME} if any_reverse_name else _rules(reverse_name)
        if option is not None or profile is not None:
            changes["profile_options"] = lambda entry: _profile_options(
                profile or entry.profile, entry.profile_options, option
            )
        if not changes:
            raise CommandError("nothing to change", "see sealgate service update --help", ExitCode.USAGE)
        entry = update_service(
            operator.store,
            owner,
            actor=operator.actor,
            reserved=operator.reserved,
            **changes,  # type: ignore[arg-type]
        )
        show(operator, changed=True, service=entry)


@service_app.command("renew", epilog="Example: sealgate service renew acme/drive --csr drive.csr")
def service_renew(
    context: typer.Context, service: ServiceName, csr: CsrFile, key_type: KeyTypeOption = KeyType.P256
) -> None:
    """Make a new key and its CSR; the present certificate serves until the new one is imported."""
    with operating(context) as operator:
        owner = parse_owner(service)
        check_csr_file(csr)
        _service_of(operator, owner)
        request = renew_key(operator.store, owner, actor=operator.actor, key_type=key_type)
        write_csr(request, csr)
        show(operator, changed=True, service=operator.store.snapshot().services[owner], csr=csr)


@service_app.command("import-cert", epilog="Example: sealgate service import-cert acme/drive drive.pem")
def service_import(
    context: typer.Context,
    service: ServiceName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The certificate (PEM or DER).")],
) -> None:
    """Take the certificate that the tenant's root made of the CSR."""
    with operating(context) as operator:
        owner, certificate = parse_owner(service), certificate_from(file)
        _service_of(operator, owner)
        before = operator.store.revision()
        import_certificate(operator.store, owner, certificate, actor=operator.actor)
        changed = operator.store.revision() != before
        show(operator, changed=changed, service=_service_of(operator, owner))


@service_app.command("remove", epilog="Example: sealgate service remove acme/drive")
def service_remove(context: typer.Context, service: ServiceName) -> None:
    """Remove a network service and its private key; the running proxy drops its keys."""
    with operating(context) as operator:
        owner = parse_owner(service)
        remove_service(operator.store, owner, actor=operator.actor)
        operator.say({"changed": True, "removed": str(owner)}, f"network service {owner} removed")


# Looking.


@program.command("list", epilog="Example: sealgate list --json")
def list_all(context: typer.Context) -> None:
    """Tenants and network services."""
    with operating(context, looks=True) as operator:
        directory = operator.store.snapshot()
        data = {
            "revision": directory.revision,
            "tenants": [
                _tenant_json(tenant)
                | {"services": [_service_json(service) for service in directory.services_of(tenant.tenant)]}
                for tenant in directory.tenants.values()
            ],
        }
        operator.say(data, lambda: _directory_text(directory))


@program.command("history", epilog="Example: sealgate history --after 12")
def history(
    context: typer.Context,
    after: Annotated[int, typer.Option("--after", min=0, help="Only changes with a higher revision.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most so many.")] = 1000,
) -> None:
    """Who changed what, oldest first."""
    with operating(context, looks=True) as operator:
        changes = operator.store.history(after=after, limit=limit)

        def text() -> str:
            return "\n".join(
                f"{change.revision:5} {_time(change.at_ms)} {change.action} "
                f"{change.tenant}{'/' + change.service if change.service else ''} by {change.actor}"
                + "".join(f" {name}={value}" for name, value in change.detail.items())
                for change in changes
            )

        operator.say({"changes": [change.as_json() for change in changes]}, text)


@profile_app.command("list")
def profile_list(context: typer.Context) -> None:
    """The profiles there are."""
    found = [PROFILES[name] for name in sorted(PROFILES)]
    options_of(context).emit(
        {"profiles": [profile.describe() for profile in found]},
        lambda: "\n".join(f"{profile.name:12} {profile.summary}" for profile in found),
    )


@profile_app.command("show", epilog="Example: sealgate profile show generic")
def profile_show(context: typer.Context, name: Annotated[str, typer.Argument(metavar="PROFILE")]) -> None:
    """What becomes of each operation, and what stops working on ciphertext."""
    profile = profile_named(_check_profile(name))
    options_of(context).emit(profile.describe(), profile.text)


@program.command("errors", epilog="Example: sealgate errors > errors.md")
def errors(context: typer.Context) -> None:
    """Every answer the proxy gives in place of forwarding, as a Markdown table."""
    found = all_refusals()
    options_of(context).emit(
        {
            "errors": [
                {
                    "code": refusal.code,
                    "status": refusal.status,
                    "cause": refusal.cause,
                    "next_step": refusal.next_step,
                    "retry_after_s": refusal.retry_after_s,
                }
                for refusal in found
            ]
        },
        refusal_table,
    )


@program.command("inspect", epilog="Example: sealgate inspect report.pdf --json")
def inspect(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A stored object or field.")],
) -> None:
    """Say what can be said of stored bytes without a key; exit code 3 if they are damaged."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        data = stream.read(_INSPECTED_BYTES)
        stream.seek(max(0, size - _TAIL_BYTES))
        tail = stream.read(_TAIL_BYTES)
    description = describe(data, stored_bytes=max(size, len(data)), tail=tail)
    options_of(context).emit(_description_json(description), lambda: _description_text(description))
    if description.problems:
        raise typer.Exit(ExitCode.REFUSED)


@program.command("doctor", epilog="Example: sealgate doctor --json")
def doctor_command(context: typer.Context) -> None:
    """Check the installation and say how to mend it; exit code 1 if something failed."""
    with _packages_of_the_proxy():
        from proxy import doctor  # noqa: PLC0415 - it imports the engine

    chosen = options_of(context)
    checks = doctor.examine(chosen.config_file, chosen.load, SystemClock())
    chosen.emit(report.as_json(checks), lambda: report.as_text(checks))
    if report.has_failed(checks):
        raise typer.Exit(ExitCode.FAILED)


@program.command("run", epilog="Example: sealgate --config /etc/sealgate/sealgate.toml run")
def run(context: typer.Context) -> None:
    """Serve until SIGTERM."""
    settings = options_of(context).load()
    check_state_dir(settings.proxy.state_dir)
    certificates.make_private_directory(settings.proxy.state_dir)
    with _packages_of_the_proxy():
        from proxy.app import run_proxy  # noqa: PLC0415 - it imports the engine

    run_proxy(settings)


@contextlib.contextmanager
def _packages_of_the_proxy() -> Iterator[None]:
    """The agent's environment has this command too, but not all that `run` and `doctor` need."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the package {str(error.name).partition('.')[0]} is not installed here",
            "pip install --require-hashes -r requirements-proxy.lock; the agent's lock file lacks the engine",
            ExitCode.UNAVAILABLE,
            code="package",
        ) from error


# Arguments.


def _listen(text: str | None) -> Listen | None:
    try:
        return None if text is None else Listen.parse(text)
    except FormatError as error:
        raise usage_error(
            error, "give an IP address and a port: 127.0.0.1:3128, 0.0.0.0:443, [::]:443"
        ) from None


def _upstream(text: str) -> Upstream:
    try:
        return Upstream.parse(text)
    except FormatError as error:
        raise usage_error(error, "give the service's address: https://drive.example.com") from None


def _rules(patterns: Sequence[str] | None) -> frozenset[str]:
    try:
        return frozenset(TunnelRule.parse(pattern).pattern for pattern in patterns or ())
    except FormatError as error:
        raise usage_error(error, "give host names, or *.domain.example for all below it") from None


def _check_profile(name: str) -> str:
    try:
        return profile_named(name).name
    except UnknownProfileError as error:
        raise usage_error(error, "see `sealgate profile list`") from None


def _profile_options(
    profile: str, present: Mapping[str, object], changes: list[str] | None
) -> dict[str, object]:
    """*present* with *changes* made, as the profile takes them."""
    try:
        options = edited(present, changes or ())
        profile_named(profile).options.of(options)
    except FormatError as error:
        raise usage_error(error, f"see `sealgate profile show {profile}`") from None
    return options


def _certificates(paths: Sequence[Path] | None) -> list[x509.Certificate]:
    return [certificate_from(path) for path in paths or ()]


def _exclusive(one: str, has_one: bool, other: str, has_other: bool) -> None:
    if has_one and has_other:
        raise CommandError(f"{one} and {other} exclude each other", "give one of them", ExitCode.USAGE)


def _service_of(operator: Operator, owner: NetworkService) -> ServiceEntry:
    entry = operator.store.snapshot().services.get(owner)
    if entry is None:
        raise not_there(f"there is no network service {owner}")
    return entry


# Results.


def show(
    operator: Operator,
    *,
    changed: bool,
    tenant: TenantEntry | None = None,
    service: ServiceEntry | None = None,
    csr: Path | None = None,
) -> None:
    data: dict[str, object] = {"changed": changed, "revision": operator.store.revision()}
    lines = [] if changed else ["unchanged"]
    if tenant is not None:
        data["tenant"] = _tenant_json(tenant)
        lines += _tenant_lines(tenant)
    if service is not None:
        data["service"] = _service_json(service)
        lines += _service_lines(service)
    if csr is not None and service is not None:
        data["csr_file"] = str(csr)
        lines.append(f"  request written to {csr}; have the tenant's root sign it, then")
        lines.append(f"  sealgate service import-cert {service.owner} FILE")
    operator.say(data, "\n".join(lines))


def _tenant_json(tenant: TenantEntry) -> dict[str, object]:
    return {
        "tenant": tenant.tenant,
        "root_sha256": fingerprint(tenant.root_certificate).hex(),
        "root_not_after": tenant.root_certificate.not_valid_after_utc.isoformat(),
        "forward_listen": None if tenant.forward_listen is None else str(tenant.forward_listen),
        "tunnel_hosts": sorted(tenant.tunnel_hosts),
        "signers": [fingerprint(signer).hex() for signer in tenant.signers],
        "interception_ca_file": str(tenant.interception_ca.certificate_file),
    }


def _service_json(service: ServiceEntry) -> dict[str, object]:
    certificate = service.certificate
    return {
        "service": str(service.owner),
        "state": "waits for its certificate" if certificate is None else "provisioned",
        "upstream": str(service.upstream),
        "profile": service.profile,
        "legacy": service.legacy.value,
        "reverse_listen": None if service.reverse_listen is None else str(service.reverse_listen),
        "reverse_names": sorted(service.reverse_names),
        "profile_options": dict(service.profile_options),
        "certificate_sha256": None if certificate is None else fingerprint(certificate).hex(),
        "not_after": None if certificate is None else certificate.not_valid_after_utc.isoformat(),
    }


def _tenant_lines(tenant: TenantEntry) -> list[str]:
    lines = [f"tenant {tenant.tenant}"]
    lines.append(f"  root sha256 {fingerprint(tenant.root_certificate).hex()}")
    lines.append(f"  forward proxy {tenant.forward_listen or 'none'}")
    if tenant.tunnel_hosts:
        lines.append(f"  tunnelled {', '.join(sorted(tenant.tunnel_hosts))}")
    if tenant.signers:
        lines.append(f"  pinned signers {', '.join(fingerprint(pin).hex()[:16] for pin in tenant.signers)}")
    return lines


def _service_lines(service: ServiceEntry) -> list[str]:
    lines = [f"network service {service.owner} -> {service.upstream}"]
    reverse = "" if service.reverse_listen is None else f", reverse proxy {service.reverse_listen}"
    lines.append(f"  profile {service.profile}, legacy {service.legacy.value}{reverse}")
    if service.reverse_names:
        lines.append(f"  in reverse mode as {', '.join(sorted(service.reverse_names))}")
    if service.profile_options:
        lines.append(f"  options {json.dumps(dict(service.profile_options), sort_keys=True)}")
    if service.certificate is None:
        lines.append("  waits for its certificate: refuses everything")
    else:
        end = service.certificate.not_valid_after_utc.date()
        lines.append(f"  certificate sha256 {fingerprint(service.certificate).hex()}, until {end}")
    return lines


def _directory_text(directory: Directory) -> str:
    if not directory.tenants:
        return "no tenants; begin with `sealgate tenant add`"
    lines: list[str] = []
    for tenant in directory.tenants.values():
        lines += _tenant_lines(tenant)
        for service in directory.services_of(tenant.tenant):
            lines += [f"  {line}" for line in _service_lines(service)]
    return "\n".join(lines)


def _description_json(description: Description) -> dict[str, object]:
    return {
        "kind": description.kind.value,
        "stored_bytes": description.stored_bytes,
        "version": description.version,
        "suite": description.suite,
        "key_id": None if description.key_id is None else str(description.key_id),
        "bind": None if description.bind is None else description.bind.name.lower(),
        "plain_bytes": description.plain_bytes,
        "parts": description.parts,
        "problems": list(description.problems),
        "authenticated": False,
    }


def _description_text(description: Description) -> str:
    facts = _description_json(description)
    if description.kind is Kind.PLAIN:
        lines = ["not sealed by Sealgate", f"  stored_bytes {description.stored_bytes}"]
    else:
        lines = [f"sealed {description.kind.value} (nothing below is authenticated: that needs the key)"]
        names = ("version", "suite", "key_id", "bind", "stored_bytes", "plain_bytes", "parts")
        lines += [f"  {name} {facts[name]}" for name in names if facts[name] is not None]
    return "\n".join(lines + [f"  problem: {problem}" for problem in description.problems])


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")


def all_refusals() -> list[Refusal]:
    """The table of proxy/refusals.py, in its order."""
    return [value for value in vars(refusals).values() if isinstance(value, Refusal)]


def refusal_table() -> str:
    """`all_refusals` as the Markdown table of docs/proxy.md."""
    lines = ["| code | status | cause | next step | retry after |", "|---|---|---|---|---|"]
    for refusal in all_refusals():
        retry = "" if refusal.retry_after_s is None else f"{refusal.retry_after_s} s"
        lines.append(
            f"| `{refusal.code}` | {refusal.status} | {refusal.cause} | {refusal.next_step} | {retry} |"
        )
    return "\n".join(lines)
