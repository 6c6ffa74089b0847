"""`sealgate tenant`: enterprises whose traffic this proxy seals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509

from envelope.certificates import fingerprint
from envelope.keys import check_name
from proxy.command_line.operating import (
    Operator,
    certificate_from,
    check_exclusive,
    host_rules,
    listen_from,
    not_there,
    operating,
)
from proxy.tenants import certificates
from proxy.tenants.model import TenantEntry
from proxy.tenants.tenant_store import add_tenant, remove_tenant, update_tenant
from proxy.users.cli import tenant_access
from runtime.cli import CommandError, ExitCode

tenant_app = typer.Typer(no_args_is_help=True, help="Tenants: enterprises whose traffic this proxy seals.")


TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Tenant id: [a-z0-9-], immutable.")]
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
        listen, rules = listen_from(forward_listen), host_rules(tunnel_host)
        known = operator.store.snapshot().tenants.get(check_name("tenant", name))
        wanted = (certificate, listen, rules, set(signers))
        if known is not None and wanted == (
            known.root_certificate,
            known.forward_listen,
            known.tunnel_hosts,
            set(known.signers),
        ):
            _show(operator, known, changed=False)
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
        _show(operator, entry, changed=True)


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
            check_exclusive("--forward-listen", forward_listen is not None, "--no-forward", no_forward)
            changes["forward_listen"] = listen_from(forward_listen)
        if tunnel_host is not None or no_tunnel_hosts:
            check_exclusive("--tunnel-host", tunnel_host is not None, "--no-tunnel-hosts", no_tunnel_hosts)
            changes["tunnel_hosts"] = host_rules(tunnel_host)
        if signer is not None or no_signers:
            check_exclusive("--signer", signer is not None, "--no-signers", no_signers)
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
        _show(operator, entry, changed=True)


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


def _certificates(paths: Sequence[Path] | None) -> list[x509.Certificate]:
    return [certificate_from(path) for path in paths or ()]


def _show(operator: Operator, tenant: TenantEntry, *, changed: bool) -> None:
    lines = ([] if changed else ["unchanged"]) + tenant_lines(tenant)
    data = {"changed": changed, "revision": operator.store.revision(), "tenant": tenant_json(tenant)}
    operator.say(data, "\n".join(lines))


def tenant_json(tenant: TenantEntry) -> dict[str, object]:
    return {
        "tenant": tenant.tenant,
        "root_sha256": fingerprint(tenant.root_certificate).hex(),
        "root_not_after": tenant.root_certificate.not_valid_after_utc.isoformat(),
        "forward_listen": None if tenant.forward_listen is None else str(tenant.forward_listen),
        "tunnel_hosts": sorted(tenant.tunnel_hosts),
        "signers": [fingerprint(signer).hex() for signer in tenant.signers],
        "interception_ca_file": str(tenant.interception_ca.certificate_file),
    }


def tenant_lines(tenant: TenantEntry) -> list[str]:
    lines = [f"tenant {tenant.tenant}"]
    lines.append(f"  root sha256 {fingerprint(tenant.root_certificate).hex()}")
    lines.append(f"  forward proxy {tenant.forward_listen or 'none'}")
    if tenant.tunnel_hosts:
        lines.append(f"  tunnelled {', '.join(sorted(tenant.tunnel_hosts))}")
    if tenant.signers:
        lines.append(f"  pinned signers {', '.join(fingerprint(pin).hex()[:16] for pin in tenant.signers)}")
    return lines
