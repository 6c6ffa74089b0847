"""`sealgate service`: network services, a tenant's cloud services.

A new private key stays here; its request is written to a file, for the tenant's root to sign.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from envelope.certificates import fingerprint
from envelope.errors import FormatError
from envelope.keys import NetworkService
from proxy.command_line.operating import (
    Operator,
    certificate_from,
    check_csr_file,
    check_exclusive,
    host_rules,
    listen_from,
    not_there,
    operating,
    parse_owner,
    usage_error,
    write_csr,
)
from proxy.command_line.profile_cli import check_profile
from proxy.plans.profile_options import edited
from proxy.profiles import profile_named
from proxy.tenants.certificates import KeyType
from proxy.tenants.model import ANY_NAME, LegacyPolicy, ServiceEntry, Upstream
from proxy.tenants.network_service_store import add_service, remove_service, update_service
from proxy.tenants.recipient_store import certificate_request, import_certificate, renew_key
from runtime.cli import CommandError, ExitCode

service_app = typer.Typer(no_args_is_help=True, help="Network services: a tenant's cloud services.")


ServiceName = Annotated[str, typer.Argument(metavar="TENANT/SERVICE", help="Network service id, immutable.")]
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
        owner, address, listen = parse_owner(service), _upstream(upstream), listen_from(reverse_listen)
        options, names = _profile_options(check_profile(profile), {}, option), host_rules(reverse_name)
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
        _show(operator, operator.store.snapshot().services[owner], changed=known is None, csr=csr)


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
            changes["profile"] = check_profile(profile)
        if legacy is not None:
            changes["legacy"] = legacy
        if reverse_listen is not None or no_reverse:
            check_exclusive("--reverse-listen", reverse_listen is not None, "--no-reverse", no_reverse)
            changes["reverse_listen"] = listen_from(reverse_listen)
        if reverse_name is not None or any_reverse_name or own_reverse_names:
            check_exclusive(
                "--reverse-name", reverse_name is not None, "--any-reverse-name", any_reverse_name
            )
            check_exclusive(
                "--reverse-name", reverse_name is not None, "--own-reverse-names", own_reverse_names
            )
            check_exclusive("--any-reverse-name", any_reverse_name, "--own-reverse-names", own_reverse_names)
            changes["reverse_names"] = {ANY_NAME} if any_reverse_name else host_rules(reverse_name)
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
        _show(operator, entry, changed=True)


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
        _show(operator, operator.store.snapshot().services[owner], changed=True, csr=csr)


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
        _show(operator, _service_of(operator, owner), changed=changed)


@service_app.command("remove", epilog="Example: sealgate service remove acme/drive")
def service_remove(context: typer.Context, service: ServiceName) -> None:
    """Remove a network service and its private key; the running proxy drops its keys."""
    with operating(context) as operator:
        owner = parse_owner(service)
        remove_service(operator.store, owner, actor=operator.actor)
        operator.say({"changed": True, "removed": str(owner)}, f"network service {owner} removed")


def _upstream(text: str) -> Upstream:
    try:
        return Upstream.parse(text)
    except FormatError as error:
        raise usage_error(error, "give the service's address: https://drive.example.com") from None


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


def _service_of(operator: Operator, owner: NetworkService) -> ServiceEntry:
    entry = operator.store.snapshot().services.get(owner)
    if entry is None:
        raise not_there(f"there is no network service {owner}")
    return entry


def _show(operator: Operator, service: ServiceEntry, *, changed: bool, csr: Path | None = None) -> None:
    data: dict[str, object] = {
        "changed": changed,
        "revision": operator.store.revision(),
        "service": service_json(service),
    }
    lines = ([] if changed else ["unchanged"]) + service_lines(service)
    if csr is not None:
        data["csr_file"] = str(csr)
        lines.append(f"  request written to {csr}; have the tenant's root sign it, then")
        lines.append(f"  sealgate service import-cert {service.owner} FILE")
    operator.say(data, "\n".join(lines))


def service_json(service: ServiceEntry) -> dict[str, object]:
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


def service_lines(service: ServiceEntry) -> list[str]:
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
